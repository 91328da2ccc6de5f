use strict; use warnings;
my ($sum, %seen, @words) = (0);
for my $i (1 .. 20000) {
    my $w = join '', map { chr(97 + ($i * $_ * 7919 >> 3) % 26) } 1 .. 1 + $i % 7;
    $seen{$w}++; push @words, $w;
    $sum = ($sum * 31 + length($w) * $i) & 0xffffffff;
}
print "$sum ", scalar(keys %seen), "\n";
my @sorted = sort { $seen{$b} <=> $seen{$a} or $a cmp $b } keys %seen;
print join(' ', map { "$_=$seen{$_}" } @sorted[0 .. 49]), "\n";
my $text = join ' ', @words;
my $n = () = $text =~ /(\w)(\w)\2\1/g; print "$n\n";
(my $swapped = $text) =~ s/\b(\w)(\w*)(\w)\b/$3$2$1/g;
my $check = 0; $check = ($check * 33 ^ ord) & 0x7fffffff for split //, substr($swapped, 0, 50000);
print "$check\n";
my $x = 0.5; for my $i (1 .. 5000) { $x = sin($x * 3) + cos($i) / (1 + $i ** 0.5); } printf "%.12g %.10e\n", $x, exp($x) ** 3.7;
printf "%s\n", join ',', map { sprintf '%.3f|%x|%o|%e', $_ / 7, $_ * 12345, $_, 1 / (1 + $_) } 0 .. 40;
print unpack('%32C*', pack('w/a*n*N*', $text, 1 .. 500, 1 .. 500)), "\n";
