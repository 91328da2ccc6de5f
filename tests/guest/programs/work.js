const crypto = require('crypto'); const out = [];
function fib(n) { return n < 2 ? n : fib(n - 1) + fib(n - 2); } out.push(fib(24));
const a = new Float64Array(5000); for (let i = 0; i < a.length; i++) a[i] = Math.fround(i * 1.1) / (i + 7);
let s = 0; for (let r = 0; r < 50; r++) for (let i = 0; i < a.length; i++) s += a[i] * ((r ^ i) & 3); out.push(s);
let h = 0 | 0; for (let i = 0; i < 1000000; i++) h = Math.imul(h ^ i, 16777619) >>> 1; out.push(h);
let b = 1n; for (let i = 1n; i < 200n; i++) b *= i * i + 1n; out.push(b.toString(36));
const o = {}; for (let i = 0; i < 50000; i++) o['k' + (i * 7919 % 10007)] = (o['k' + (i % 97)] || 0) + i; out.push(JSON.stringify(o).length);
for (let k = 0; k < 200; k++) { const f = new Function('x', 'for (let i = 0; i < 2000; i++) x = (x * ' + (k + 3) + ' + i) % 65521; return x'); out.push(f(k) + f(k + 1)); }
out.push('abc '.repeat(5000).replace(/(\w)(\w+)/g, (m, x, y) => y + x.toUpperCase()).length);
out.push([...Array(3000).keys()].map(i => i * 7919 % 3001).sort((x, y) => x - y).join().length);
console.log(crypto.createHash('sha256').update(out.join()).digest('hex'), out.slice(0, 3).join());
