local bit = require 'bit'
local function collatz(n) local c = 0 while n ~= 1 do if n % 2 == 0 then n = n / 2 else n = 3 * n + 1 end c = c + 1 end return c end
local best, at = 0, 0
for i = 1, 30000 do local c = collatz(i) if c > best then best, at = c, i end end
print(best, at)
local h = 0 for i = 1, 2000000 do h = bit.bxor(bit.rol(h, 5), bit.tobit(i * 40503)) end print(h)
local t = {} for i = 1, 20000 do t[i] = (i * 7919) % 10007 + i / 3 end table.sort(t)
local s = 0 for i = 1, #t do s = s + t[i] / i end print(string.format('%.14g', s))
local f = {} for k = 1, 300 do f[k] = loadstring('local a, b = ... for i = 1, 120 do a = (a * ' .. k .. ' + b) % 65521 b = b + 1 end return a') end
local m = 0 for round = 1, 3 do for k = 1, #f do m = (m + f[k](k, round)) % 1000003 end end print(m)
local ffi = require 'ffi' local a = ffi.new('double[1000]') for i = 0, 999 do a[i] = math.sqrt(i) * 1.5 end
local q = 0 for r = 1, 200 do for i = 0, 999 do q = q + a[i] * (r % 3 - 1) + a[999 - i] / (i + 1) end end print(string.format('%.12g', q))
