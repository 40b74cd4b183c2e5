"""Right programs are accepted whatever their style, in both mechanisms: what contest programs do, they may do."""

from collections.abc import Iterator

import pytest

from magistral_jax.records import Verdict
from magistral_jax.verify.code_compare import Comparison
from magistral_jax.verify.code_grade import CodeGrader, CodeVerdict
from magistral_jax.verify.code_tests import CodeTest, CodeTests
from magistral_jax.verify.config import CodeConfig
from magistral_jax.verify.format import CodeBlock
from magistral_jax.verify.sandbox.execution import Mechanism


@pytest.fixture(scope="module", params=[Mechanism.BUBBLEWRAP, Mechanism.LANDLOCK], ids=lambda it: it.value)
def grader(request: pytest.FixtureRequest) -> Iterator[CodeGrader]:
    with CodeGrader(request.param, CodeConfig()) as grader:
        yield grader


BIG_INPUT = " ".join(str(i % 1000) for i in range(800_000))
TESTS = {
    "add": [("1 2\n", "3\n"), ("20 22\n", "42\n")],
    "add_long": [("3000000000 3000000000\n", "6000000000\n")],
    "add_many": [(f"800000\n{BIG_INPUT}\n", f"{sum(i % 1000 for i in range(800_000))}\n")],  # 3 MB of input
    "count": [("100000\n", "100000\n")],
    "list": [("3\n", "0\n1\n2\n"), ("150000\n", "".join(f"{i}\n" for i in range(150_000)))],  # 1 MB of output
    "echo": [("héllo\n", "héllo\n")],
    "letters": [("1\n", "a\nb\nc\n")],
    "modules": [("5\n", "5 0 1\n")],
}


def check(grader: CodeGrader, language: str, task: str, source: str):
    tests = tuple(CodeTest(i, given.encode(), wanted.encode()) for i, (given, wanted) in enumerate(TESTS[task], 1))
    found = grader.grade(CodeBlock(language, source), CodeTests(tests, Comparison(), None, 4.0, 10.0, 300))
    assert found == CodeVerdict(Verdict.CORRECT, "tests", len(tests), len(tests))


PYTHON = {
    "plain": (
        "add",
        """
a, b = map(int, input().split())
print(a + b)
""",
    ),
    "main_guard": (
        "add",
        """
from __future__ import annotations
import sys

def main() -> None:
    print(sum(map(int, sys.stdin.readline().split())))

if __name__ == '__main__':
    main()
""",
    ),
    "global_at_top_level": (
        "add",
        """
global total
total = 0
def add(x):
    global total
    total += x
for x in input().split():
    add(int(x))
print(total)
""",
    ),
    "stdout_buffer": (
        "add",
        """
import sys
a, b = sys.stdin.buffer.read().split()
sys.stdout.buffer.write(b'%d' % (int(a) + int(b)))
""",
    ),
    "print_then_buffer": (
        "letters",
        """
import sys
print('a', flush=True)
sys.stdout.buffer.write(b'b\\n')
sys.stdout.flush()
print('c')
""",
    ),
    "open_0": (
        "add",
        """
print(sum(map(int, open(0).read().split())))
""",
    ),
    "lines_of_stdin": (
        "add",
        """
import sys
print(eval('+'.join(next(sys.stdin).split())))
""",
    ),
    "os_read_of_stdin_size": (
        "add",
        """
import io, os
lines = io.BytesIO(os.read(0, os.fstat(0).st_size))
print(sum(map(int, lines.readline().split())))
""",
    ),
    "os_exit": (
        "add",
        """
import os, sys
print(sum(map(int, input().split())))
sys.stdout.flush()
os._exit(0)
print('never')
""",
    ),
    "exit_builtin": (
        "add",
        """
print(sum(map(int, input().split())))
exit()
print('never')
""",
    ),
    "sys_exit_with_0": (
        "add",
        """
import sys
print(sum(map(int, input().split())))
sys.exit(0)
""",
    ),
    "until_eof": (
        "add",
        """
total = 0
while True:
    try:
        total += sum(map(int, input().split()))
    except EOFError:
        break
print(total)
""",
    ),
    "threads": (
        "add",
        """
import threading
found = []
def work(x):
    found.append(x)
jobs = [threading.Thread(target=work, args=(int(x),)) for x in input().split()]
for job in jobs: job.start()
for job in jobs: job.join()
print(sum(found))
""",
    ),
    "a_thread_that_is_not_joined": (
        "add",
        """
import threading, time
def work():
    time.sleep(0.05)
    print(sum(map(int, input().split())))
threading.Thread(target=work).start()
""",
    ),
    "recursion": (
        "count",
        """
import sys
sys.setrecursionlimit(10**6)
def count(n):
    return 0 if n == 0 else 1 + count(n - 1)
print(count(int(input())))
""",
    ),
    "recursion_in_a_thread_with_a_large_stack": (
        "count",
        """
import sys, threading
sys.setrecursionlimit(10**6)
threading.stack_size(2**27)
def count(n):
    return 0 if n == 0 else 1 + count(n - 1)
def main():
    print(count(int(input())))
job = threading.Thread(target=main)
job.start()
job.join()
""",
    ),
    "large_input": (
        "add_many",
        """
import sys
data = sys.stdin.read().split()
print(sum(map(int, data[1:])))
""",
    ),
    "large_input_by_lines": (
        "add_many",
        """
n = int(input())
print(sum(map(int, input().split())))
""",
    ),
    "large_output": (
        "list",
        """
for i in range(int(input())):
    print(i)
""",
    ),
    "large_output_at_once": (
        "list",
        """
print('\\n'.join(map(str, range(int(input())))))
""",
    ),
    "flush_at_every_line": (
        "list",
        """
for i in range(int(input())): print(i, flush=True)
""",
    ),
    "text_that_is_not_ascii": (
        "echo",
        """
print(input())
""",
    ),
    "modules": (
        "modules",
        """
import bisect, collections, decimal, fractions, functools, heapq, itertools, math, operator, random, re, string
from typing import List
from dataclasses import dataclass
@dataclass
class P:
    x: int
print(P(int(input())).x, bisect.bisect_left([1], 0), math.gcd(3, 5))
""",
    ),
    "main_can_be_imported": (
        "add",
        """
import __main__
x = sum(map(int, input().split()))
print(__main__.x)
""",
    ),
    "words_on_stderr": (
        "add",
        """
import sys
print(sum(map(int, input().split())))
print('debug ' * 1000, file=sys.stderr)
""",
    ),
    "200_mib": (
        "add",
        """
x = bytearray(200 * 2**20)
print(sum(map(int, input().split())))
""",
    ),
}

CPP = {
    "plain": (
        "add",
        """
#include <bits/stdc++.h>
int main() { int a, b; std::cin >> a >> b; std::cout << a + b << std::endl; }
""",
    ),
    "own_headers": (
        "add",
        """
#include <iostream>
#include <vector>
int main() { int a, b; std::cin >> a >> b; std::cout << a + b << std::endl; return 0; }
""",
    ),
    "pragma_before_include": (
        "add",
        """
#pragma GCC optimize("O3,unroll-loops")
#include <bits/stdc++.h>
int main() { int a, b; std::cin >> a >> b; std::cout << a + b << std::endl; }
""",
    ),
    "define_before_include": (
        "add_long",
        """
#define _GLIBCXX_DEBUG
#define ll long long
#include <bits/stdc++.h>
#define int ll
using namespace std;
signed main() { int a, b; cin >> a >> b; cout << a + b << endl; }
""",
    ),
    "header_twice": (
        "add",
        """
#include <bits/stdc++.h>
#include <bits/stdc++.h>
int main() { int a, b; std::cin >> a >> b; std::cout << a + b << std::endl; }
""",
    ),
    "scanf": (
        "add",
        """
#include <cstdio>
int main() { int a, b; scanf("%d %d", &a, &b); printf("%d\\n", a + b); }
""",
    ),
    "fast_io": (
        "add_many",
        """
#include <bits/stdc++.h>
using namespace std;
int main() { ios::sync_with_stdio(false); cin.tie(nullptr);
  int n; cin >> n; long long s = 0, x; while (n--) cin >> x, s += x; cout << s << '\\n'; }
""",
    ),
    "getchar_unlocked": (
        "add_many",
        """
#include <bits/stdc++.h>
int read() { int c = getchar_unlocked(), x = 0; while (c < '0') c = getchar_unlocked();
  while (c >= '0') x = x * 10 + c - '0', c = getchar_unlocked(); return x; }
int main() { int n = read(); long long s = 0; while (n--) s += read(); printf("%lld", s); }
""",
    ),
    "stdin_mapped": (
        "add",
        """
#include <bits/stdc++.h>
#include <sys/mman.h>
#include <sys/stat.h>
int main() { struct stat s; fstat(0, &s);
  char *p = (char *)mmap(0, s.st_size, PROT_READ, MAP_PRIVATE, 0, 0); int a, b;
  sscanf(p, "%d %d", &a, &b); printf("%d", a + b); }
""",
    ),
    "online_judge": (
        "add",
        """
#include <bits/stdc++.h>
int main() {
#ifndef ONLINE_JUDGE
  freopen("input.txt", "r", stdin);
#endif
  int a, b; std::cin >> a >> b; std::cout << a + b << std::endl; }
""",
    ),
    "recursion": (
        "count",
        """
#include <bits/stdc++.h>
int count(int n) { volatile char frame[200] = {}; return n ? 1 + count(n - 1) : frame[0]; }
int main() { int n; std::cin >> n; std::cout << count(n); }
""",
    ),
    "threads": (
        "add",
        """
#include <bits/stdc++.h>
int main() { int a, b, s = 0; std::cin >> a >> b; std::mutex m;
  auto add = [&](int x) { std::lock_guard l(m); s += x; };
  std::thread p(add, a), q(add, b); p.join(); q.join(); std::cout << s; }
""",
    ),
    "large_output_line_by_line": (
        "list",
        """
#include <bits/stdc++.h>
int main() { int n; std::cin >> n; for (int i = 0; i < n; i++) std::cout << i << std::endl; }
""",
    ),
    "exit": (
        "add",
        """
#include <bits/stdc++.h>
int main() { int a, b; std::cin >> a >> b; std::cout << a + b << std::endl; exit(0); }
""",
    ),
    "200_mib": (
        "add",
        """
#include <bits/stdc++.h>
int main() { std::vector<int> v(50'000'000, 1);
  int a, b; std::cin >> a >> b; std::cout << a + b << std::endl; return v[7] - 1; }
""",
    ),
    "ordered_set_and_int128": (
        "add",
        """
#include <bits/stdc++.h>
#include <ext/pb_ds/assoc_container.hpp>
using namespace __gnu_pbds;
tree<int, null_type, std::less<int>, rb_tree_tag, tree_order_statistics_node_update> t;
int main() { t.insert(3); __int128 big = t.order_of_key(4);
  int a, b; std::cin >> a >> b; std::cout << a + b << std::endl; return (int)big - 1; }
""",
    ),
    "recursion_10_times_deeper": (
        "count",
        """
#include <bits/stdc++.h>
int count(int n) { volatile char frame[100] = {}; return n ? 1 + count(n - 1) : frame[0]; }
int main() { int n; std::cin >> n; std::cout << count(10 * n) / 10; }
""",
    ),
    "cpp20": (
        "add",
        """
#include <bits/stdc++.h>
int main() { std::vector<int> v(2); for (auto &x : v) std::cin >> x;
  auto twice = v | std::views::transform([](int x) { return 2 * x; });
  std::cout << std::accumulate(twice.begin(), twice.end(), 0) / 2 << '\\n'; }
""",
    ),
}


@pytest.mark.parametrize("name", PYTHON)
def test_a_right_python_program(name: str, grader: CodeGrader):
    check(grader, "python", *PYTHON[name])


@pytest.mark.parametrize("name", CPP)
def test_a_right_cpp_program(name: str, grader: CodeGrader):
    check(grader, "cpp", *CPP[name])
