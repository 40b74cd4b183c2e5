"""Answers that are made to hang, to exhaust memory, or to be executed.

Each is graded as the answer, as the reference, and against a variant of itself, in a child process of its own whose CPU
time and address space the kernel limits: a child that breaks a limit is killed, and the test fails.
"""

import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator

from magistral_jax.verify.extract import extract_answer
from magistral_jax.verify.math_answer import grade_math

CPU_SECONDS = 2  # one on a quiet machine; a busy one gets less out of a second
ADDRESS_SPACE = 2**30

MATRIX = r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"
PATHOLOGIES = {
    "tower": [
        "9^9^9^9", "9^{9^{9^{9}}}", "2^{10000000000}", "2^2^2^2^2^2^2^2^2", "7^7^7^7 mod 10", "10^{10^{10^{10}}}",
        "2^{-9^{9^9}}", "0.5^{9^{9^9}}", "(1/3)^{10^{12}}", "9**9**9**9", "x^{x^{x^{x^{x}}}}", "2^{x^{100^{100}}}",
        "(-1)^{9^{9^9}}", "1^{9^{9^9}}+1", "e^{e^{e^{e^{e}}}}", r"\pi^{\pi^{\pi^{\pi^{\pi}}}}", "i^{i^{i^{i}}}",
        "(1+i)^{(1+i)^{(1+i)^{99}}}", "10^{-10^{10}}", r"\dfrac{5^{5^{5^{5^5}}-4}-5}{16}",
        r"2^{2^{2^{2^{2^2}}}} \bmod 7", "(2^{64})^{2^{64}}", "99999999^{99999999}", "1e999", "1e1000000000",
        "2^{1e100}", "(10^{400})^{400}", "3^{3^{3^{3}}} - 3^{3^{3^{3}}}",
    ],
    "factorial": [
        "(((((5!)!)!)!)!)", "10000000!", "100000!", "2000!", "2001!", "1999!/1998!", "(10^{10})!", "(2^{64})!", "1.5!",
        "(-5)!", "x!", "((x!)!)!", "(10^{100})!!", "5" + "!" * 500, "(n!)!/n!", "(i)!", "20000000000000000000!",
    ],
    "binomial": [
        r"\binom{10^9}{5 \cdot 10^8}", r"\binom{10^{100}}{3}", r"\binom{10^{100}}{10^{99}}", r"\binom{1000000}{500000}",
        r"\binom{x}{10^9}", r"\binom{-5}{3}", r"\binom{1/2}{1000000}", r"\binom{2000}{1000}", r"\binom{i}{i}",
        r"\binom{\binom{\binom{10}{5}}{5}}{5}", r"{10^9 \choose 10^8}", r"\binom{10^{20}}{10^{19}+1/2}",
    ],
    "radical": [
        r"\sqrt{" * 20 + "2" + "}" * 20, r"\sqrt{2+" * 20 + "2" + "}" * 20, r"\sqrt" * 200 + "2", r"\sqrt[10^9]{2}",
        r"\sqrt[0]{2}", r"\sqrt[-1]{2}", r"\sqrt[x]{x}", r"\sqrt[3]{" + "9" * 390 + "}",
        r"\sqrt{" + "+".join(rf"\sqrt{{{p}}}" for p in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29)) + "}",
        "+".join(rf"\sqrt{{{n}}}" for n in range(2, 70)), r"\sqrt[7]{\sqrt[11]{\sqrt[13]{x+y+z}}}",
        r"\sqrt{-1}^{\sqrt{-1}^{\sqrt{-1}}}", r"\sqrt{x^2}" * 20, r"(\sqrt2+\sqrt3)^{1000}",
    ],
    "sum": [
        r"\sum_{k=1}^{10^9} k!", r"\sum_{k=1}^{\infty} \frac{1}{k^2}", r"\sum_{k=1}^{\infty} \frac{1}{k}",
        r"\sum_{k=1}^{n} k^{50}", r"\sum_{k=1}^{n} k^{k}",
        r"\sum_{k=1}^{1000} \sum_{j=1}^{1000} \frac{1}{k+j}", r"\prod_{k=1}^{1000} (x+k)",
        r"\sum_{k=1}^{1/2} k",
        r"\sum_{k=10^{100}}^{10^{100}+5} k", r"\sum_{k=0}^{n} \binom{n}{k}^3", r"\sum_{k=1}^{9^{9^9}} 1",
        "+".join([r"\sum_{k=1}^{n} k^{k}"] * 20), ",".join(rf"\sum_{{k=1}}^{{n}} k^{{{n}}}" for n in range(40)),
    ],
    "integral": [
        r"\int_0^{\infty} e^{-x^2} dx", r"\int_0^{\infty} \frac{\sin x}{x} dx",
        r"\int_0^1 \int_0^1 \int_0^1 \sin(xyz) dx dy dz",
        r"\int_0^1 (1+x)^{1000} dx", r"\int_0^1",
        r"\int_0^{n} \frac{1}{\sqrt{1-k^2 \sin^2 t}} dt", 
    ],
    "limit": [
        r"\lim_{x \to 0} \frac{\sin x}{x}", r"\lim_{n \to \infty} (1+\frac1n)^n", r"\lim_{x \to 0} x^{x^{x^{x}}}",
        r"\lim_{n \to \infty} \sum_{k=1}^{n} \frac{1}{k}", r"\lim" * 200, r"\lim_{" * 30,
    ],
    "nesting": [
        "(" * 24 + "x" + ")" * 24, "(" * 50 + "1" + ")" * 50, "(" * 999, ")" * 999, "[" * 24 + "1" + "]" * 23,
        "{" * 900, "}" * 900, r"\frac{" * 24 + "1" + "}{2}" * 24, r"\frac" * 300, r"\text{" * 100,
        r"\begin{pmatrix}" * 60, "|" * 900, "|x|" * 200, "||||x||||", "-" * 900 + "1", "+-" * 400 + "1",
        r"\pm" * 100 + "1", r"1\pm2" * 100, r"\sin" * 300 + "x", r"\sin(" * 24 + "x" + ")" * 24,
        "f(" * 24 + "x" + ")" * 24, "a_" * 300, "a_{" * 24 + "1" + "}" * 24, "x^" * 300 + "2",
        "x^{" * 24 + "2" + "}" * 24, "1" + "/2" * 400, r"\overline{" * 24 + "x" + "}" * 24, "x" + "'" * 900,
        "!" * 900, "%" * 900, "1" + "%" * 900, r"\degree" * 100,
    ],
    "list": [
        "1" + ",1" * 400, ",".join(map(str, range(230))), r"\{" + ",".join(map(str, range(230))) + r"\}",
        r"\{" + ",".join(rf"\sqrt{{{n}}}" for n in range(80)) + r"\}", "(" + ",".join(["1/3"] * 200) + ")",
        ",".join(f"x+{n}" for n in range(180)), ",".join(rf"\sin {n}" for n in range(100)),
        r"\cup".join(f"({n},{n + 1})" for n in range(80)), "=x=".join(map(str, range(150))),
        "<".join(map(str, range(200))), "x<" * 450, "=" * 900, "," * 900, ";" * 900, r"\{x | x > 2\}" * 50,
        " or ".join(f"x={n}" for n in range(100)), ",".join(rf"\pm {n}" for n in range(120)),
        r"\{" + ",".join(f"{n}!" for n in range(100, 200)) + r"\}", ",".join(f"x^{n}" for n in range(150)),
        ",".join(f"a_{{{n}}}+b" for n in range(90)),
    ],
    "digits": [
        "1" * 400, "1" * 401, "9" * 999, "1" * 100_000, "0." + "3" * 399, "1" * 200 + "." + "1" * 190, "1/" + "7" * 390,
        "9" * 390 + "!", "9" * 300 + "^" + "9" * 300, "0x" + "f" * 300, "1," * 300 + "000", "123," * 200, "1 " * 400,
        "1'" + "000'" * 100 + "000", "1_1", "10_10", "9_2", "1" * 300 + "_{36}", "A" * 300 + "_{16}",
        r"0.\overline{" + "1" * 390 + "}", "0." + "142857" * 60 + "...", "1e308*1e308", "0.1e-400", "1." * 300,
    ],
    "matrix": [
        MATRIX + "^{1000000}", MATRIX * 20, MATRIX * 6, "+".join([MATRIX] * 20), "9^{9^9}" + MATRIX, MATRIX + "^{-1}",
        r"\begin{pmatrix}" + r"\\".join("&".join("1" * 15) for _ in range(15)) + r"\end{pmatrix}",
        r"\begin{pmatrix}" + "&".join("x" * 200) + r"\end{pmatrix}", r"\begin{pmatrix}a&b\\c&d\end{pmatrix}" * 12,
        "e^{" + MATRIX + "}", r"\begin{pmatrix}" + MATRIX + r"\end{pmatrix}", r"\begin{pmatrix}1&2\\3\end{pmatrix}",
        r"\begin{pmatrix}" + r"1\\" * 300 + r"\end{pmatrix}", r"\begin{cases}" * 30 + "1",
        r"\begin{pmatrix}9^{9^9}&1\\1&1\end{pmatrix}" * 2, r"\begin{array}{" + "c" * 300 + r"}1\end{array}",
    ],
    "symbols": [
        "x^{10^{10}}", "((x+1)^{1000})^{1000}", "(x+y+z+w)^{1000}", "(x+1)^{500}-(x-1)^{500}", "(1+x)^{1/1000000}",
        "x^{10^{100}}+y^{10^{100}}", r"\left(x+\frac1x\right)^{100}", "(a+b)(b+c)(c+d)(d+e)(e+f)(f+g)(g+h)" * 4,
        r"\frac{x^{200}-1}{x-1}", "+".join(f"x^{{{n}}}" for n in range(120)),
        "(" + ")(".join(f"x-{n}" for n in range(150)) + ")", r"x^{\sqrt{2}^{\sqrt{3}^{\sqrt{5}}}}",
        r"\frac{1}{1+" * 24 + "x" + "}" * 24, r"\ln" * 30 + "x", r"\ln(\ln(\ln(\ln(x))))", "a" * 900, "abcdefgh" * 100,
        r"\alpha" * 150, "x_{1}" * 150, r"\log_{\log_{\log_2 3} 5} 7", r"\log_1 5", r"\log_0 5", r"\log_{-1} x",
        r"\lfloor" * 20 + "x" + r"\rfloor" * 20,
    ],
    "argument": [
        r"\tan(10^{100})", r"\sin(2^{2^{100}})", r"\sin(10^{400})", r"\cos(9^{9^9})", r"\exp(10^{10})",
        r"\ln(10^{10^{10}})", r"\arctan(10^{400})", r"\lfloor 10^{10^{10}} \rfloor", r"\lceil \pi^{1000} \rceil",
        r"10^{1000} \bmod 7", r"9^{9^9} \bmod 7", r"\gcd(9^{999}, 3^{999})", "lcm(" + "97," * 200 + "89)",
        r"\gcd(" + ",".join(map(str, range(1, 199))) + ")", r"\sinh(10^{20})", r"\tan(\pi/2)", r"\sec(\pi/2)",
        r"\cot 0", r"\arcsin 10^{100}", r"\max(" + ",".join(f"{n}^{n}" for n in range(1, 99)) + ")", "0^0", "0^{-1}",
        "0/0", r"\infty/\infty", r"\infty-\infty", "1/(1-1)", r"\frac{1}{0}", "0!/0",
    ],
    "mixed number": [
        "9 9/9 9/9", "1 1/2 1/2", r"3\frac{1}{2}\frac{1}{2}", "1 2 3/4", "1 " * 100 + "1/2", "5 1/0", r"1\frac" * 100,
        r"\frac{1}{2}" * 60, "9" * 200 + " 1/2", "1 1/" + "9" * 300, "1/1/1/1/1/1/1/2", "1:2:3:4", "1" + ":2" * 300,
    ],
    "unicode": [
        "٣", "²" * 300, "x" + "²" * 300, "\x00", "\ud800", "\u202e5", "∞" * 300, "√" * 300 + "2", "½" * 100, "①②③",
        "\u0301" * 500, "é" * 900, "\u200b5\u200b", "ﷺ" * 300, "π" * 300, "∑" * 300, "一" * 900, "5\u00a0000",
        "\U0001f600" * 200, "⁰¹²³⁴⁵⁶⁷⁸⁹" * 40, "₀" * 400, "\ufeff5", "Ａ", "ⅷ", "㎏" * 200,  # noqa: RUF001
    ],
    "injection": [
        "__import__('os').system('touch CANARY')", "exec(\"open('CANARY','w')\")", "eval('open(\"CANARY\",\"w\")')",
        "().__class__.__base__.__subclasses__()", "open('CANARY','w')", "Symbol('x').__class__.__init__.__globals__",
        "lambda: open('CANARY','w')", "[open('CANARY','w') for _ in (1,)]", "x=open('CANARY','w')",
        r"\text{__import__('os').system('touch CANARY')}", r"\operatorname{exec}(open('CANARY','w'))",
        "import os; os.system('touch CANARY')", "sympify(\"__import__('os').system('touch CANARY')\")",
        "parse_expr('open(\"CANARY\",\"w\")')", "{{open('CANARY','w')}}", "$(touch CANARY)", "`touch CANARY`",
        "; touch CANARY;", "| touch CANARY", r"\input{/etc/passwd}", r"\immediate\write18{touch CANARY}",
        "%n%n%n%s%s%s", "{0.__class__}", "{x!r:>{width}}", "%(x)s", "f'{open(\"CANARY\",\"w\")}'", "sys.exit(0)",
        "os._exit(0)", "os.kill(os.getpid(), 9)", "while True: pass", "raise SystemExit", "assert False",
        "__builtins__", "1 if open('CANARY','w') else 2", "Integral(x,(x,0,1)).doit()", "factorial(10**9)",
        "Integer(9)**Integer(9)**Integer(9)", "(1).__class__.__mro__[1].__subclasses__()", "pickle.loads(b'')",
        "'; DROP TABLE answers; --", r"\csname x\endcsname", r"\def\x{\x\x}\x", r"\loop\iftrue\repeat",
    ],
    "regex": [
        r"\text{" * 300 + "}", r"\text{ }" * 100 + "x", "{" + " " * 900 + "}", "\\" * 999, r"\ " * 499, "$" * 999,
        "$ " * 499, r"\frac{1}{2}{" * 80, "1," * 499, "1." * 499, "(" + " " * 990 + ")", r"\begin{array}{" * 50,
        r"\operatorname{" * 70, r"^\circ" * 150, "^{" * 400, "a " * 499, "a/" * 499, "per " * 240,
        "5 " + "square " * 140 + "m", "5" + " m/s" * 240, "5 m" + "^2" * 300, r"\text{m}/" * 100, "." * 999, "_" * 999,
        r"\degree 1" * 100, "1\\degree 1'" * 80, "x10^" * 200, r"\over" * 200, r"{1\over" * 100, r"\choose" * 100,
        "0.(" * 300, r"\overline" * 100, "1" * 30 + "..." + "1" * 30 + "...", "answer " * 140, "answer is " * 90,
        r"\Rightarrow" * 80, r"\text{a:}" * 120, "and " * 240, "1and" * 240, "or" * 490, r"1\!" * 240, r"\tag{" * 190,
        "\t" * 999 + "1", "\n" * 999 + "1", "5 feet 6 inches " * 60, r"\begin{aligned}" * 60, r"\quad x=" * 110,
    ],
}  # fmt: skip
COMPLETIONS = [
    "$" * 300_000, "answer: " * 50_000, r"\boxed{" * 50_000, "1" * 300_000, "1," * 150_000, r"\[" * 100_000,
    "#### " * 60_000, "a$b$" * 80_000, "answer" + " " * 300_000, "<answer>" * 40_000, r"\boxed{1} and " * 20_000,
    "$1$, " * 60_000, "<|" * 100_000, r"\begin{align}" * 20_000, "1 " * 200_000, "**" * 100_000, "</think>" * 50_000,
]  # fmt: skip


def test_every_pathology_is_decided_within_the_limits(tmp_path: pathlib.Path):
    canary = tmp_path / "canary"
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    command = [sys.executable, __file__, str(canary)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True, text=True)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    num_pathologies = sum(map(len, PATHOLOGIES.values()))
    assert num_pathologies >= 200
    assert len(results) == 3 * num_pathologies + len(COMPLETIONS)
    assert [result for result in results if result["status"] != 0] == []
    verdicts = {"wrong", "unparsable", "too_large", "timeout"}
    assert [result for result in results if result["verdict"] not in verdicts] == []
    assert not canary.exists()
    assert list(tmp_path.iterdir()) == []


# ---- the process that grades, a child for each item -----------------------------------------------------------------


def _gradings(text: str) -> Iterator[tuple[str, str]]:
    yield text, "7"
    yield "7", text
    yield text, f"({text})+1"


def _run_all(canary: str) -> None:
    for answer, reference in (
        (r"\frac{1}{2}", "0.5"),
        ("(x-1)(x+1)", "x^2-1"),
        (r"\sum_{k=1}^{n} k", r"\frac{n(n+1)}{2}"),
    ):
        grade_math(answer, reference)  # what a worker loads before it serves
    for kind, texts in PATHOLOGIES.items():
        for text in (text.replace("CANARY", canary) for text in texts):
            for number, (answer, reference) in enumerate(_gradings(text)):
                _report(f"{kind} {number} {text[:60]!r}", _verdict, answer, reference)
    for text in COMPLETIONS:
        _report(f"completion {text[:20]!r}", _extracted, text)


def _verdict(answer: str, reference: str) -> str:
    return grade_math(answer, reference)[0].value


def _extracted(text: str) -> str:
    extract_answer(text)
    return "wrong"  # what was extracted is no answer to anything


def _report(name, grade, *texts) -> None:
    """Print what a child finds out: the verdict, and how it ended."""
    sys.stdout.flush()
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        try:
            os.write(send, grade(*texts).encode())
        except Exception as error:
            os.write(send, repr(error).encode())
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as stream:
        verdict = stream.read()
    print(json.dumps({"name": name, "verdict": verdict, "status": os.waitpid(pid, 0)[1]}))


if __name__ == "__main__":
    _run_all(sys.argv[1])
