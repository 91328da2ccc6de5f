"""A workload for sqlite: run as `sqlite.py ROWS` it prints the digest of every answer."""

import hashlib
import sqlite3
import sys
import tempfile

ROWS = int(sys.argv[1])
folder = tempfile.TemporaryDirectory()
db = sqlite3.connect(f"{folder.name}/db")
db.executescript("""
    create table t(id integer primary key, a integer, b real, c text);
    create index by_a on t(a);
    create index by_c on t(c, b);
""")
with db:
    db.executemany(
        "insert into t values (?, ?, ?, ?)",
        ((i, i * 7919 % 10007, i / 7 - (i * i % 101) * 1.25e-3, f"row {i * 31 % 997:04}") for i in range(ROWS)),
    )
out: list[str] = []
for query in (
    "select count(*), sum(a), printf('%.12g', sum(b)), printf('%.12g', avg(b * b)) from t",
    "select c, count(*), printf('%.10f', max(b)), min(a) from t group by c order by c limit 100",
    "select x.id, y.id, printf('%.15g', x.b * y.b) from t x join t y on x.a = y.a and x.id < y.id "
    "order by 1, 2 limit 500",
    "with recursive f(n, x) as (select 1, 1.0 union all select n + 1, x * 1.000001 + 1.0 / n from f where n < 5000) "
    "select printf('%.15g', x) from f where n % 500 = 0",
    "select group_concat(upper(substr(c, 5)) || ':' || abs(a % 17), ',') "
    "from (select * from t order by b desc limit 200)",
):
    out += map(repr, db.execute(query))
with db:
    out.append(repr(db.execute("update t set b = b + a where a % 3 = 0").rowcount))
    out.append(repr(db.execute("delete from t where id % 5 = 2").rowcount))
db.execute("vacuum")
out.append(repr(db.execute("pragma integrity_check").fetchall()))
out += map(repr, db.execute("select id, printf('%.15g', b) from t order by c, b, id limit 300"))
print(hashlib.sha256("\n".join(out).encode()).hexdigest(), len(out))
