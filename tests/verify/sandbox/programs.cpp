// Programs that a sandbox has to run, or to end, in the right way. The first argument names one.
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

volatile long sink;

__attribute__((noinline)) long deep(long n) {
    volatile char frame[200];
    frame[n % 200] = 1;
    return n == 0 ? 0 : 1 + deep(n - 1) + 0 * frame[0];
}

void spin() {
    for (;;) sink = sink + 1;
}

// For long, and with the outputs closed, as daemons do.
void wait_on() {
    for (int i = 0; i < 3; i++) close(i);
    sleep(1000);
    _exit(0);
}

std::map<std::string, std::function<int()>> programs = {
    {"hello",
     [] {
         std::cout << "hello\n";
         return 0;
     }},
    {"sum",
     [] {
         long sum = 0, x;
         while (std::cin >> x) sum += x;
         std::cout << sum << "\n";
         return 0;
     }},
    {"echo",
     [] {
         std::cout << std::cin.rdbuf();
         return 0;
     }},
    {"megabyte",
     [] {
         std::cout << std::string(1 << 20, 'x');
         return 0;
     }},
    {"exit3", [] { return 3; }},
    {"environment",
     [] {
         for (char** e = environ; *e; e++) puts(*e);
         return 0;
     }},
    {"cwd",
     [] {
         puts(getcwd(nullptr, 0));
         return 0;
     }},
    {"segv",
     [] {
         std::cerr << "about to crash\n";
         *(volatile int*)8 = 1;
         return 0;
     }},
    {"abort",
     [] {
         abort();
         return 0;
     }},
    {"throw",
     [] {
         std::vector<int> v(1);
         return v.at(5);
     }},
    {"raise_kill",
     [] {
         raise(SIGKILL);
         puts("alive");
         return 0;
     }},
    {"raise_term",
     [] {
         raise(SIGTERM);
         return 0;
     }},
    {"bad_alloc",
     [] {
         std::vector<char> v(1ul << 30, 'x');
         return v[5];
     }},
    {"grow",
     [] {
         for (;;) memset(malloc(1 << 20), 1, 1 << 20);
         return 0;
     }},
    {"deep",
     [] {
         std::cout << deep(1000000) << "\n";
         return 0;
     }},
    {"endless_recursion",
     [] {
         std::cout << deep(1l << 60) << "\n";
         return 0;
     }},
    {"threads",
     [] {
         std::vector<std::thread> threads;
         std::vector<long> results(20);
         for (long i = 0; i < 20; i++) threads.emplace_back([&, i] { results[i] = i * i; });
         for (auto& thread : threads) thread.join();
         long sum = 0;
         for (long x : results) sum += x;
         std::cout << sum << "\n";
         return 0;
     }},
    {"random",
     [] {
         std::random_device device;
         std::cout << (device() != device()) << "\n";
         return 0;
     }},
    {"raise_stack_limit",
     [] {
         rlimit limit;
         getrlimit(RLIMIT_STACK, &limit);
         limit.rlim_cur = limit.rlim_max;
         std::cout << setrlimit(RLIMIT_STACK, &limit) << "\n";
         return 0;
     }},
    {"spin",
     [] {
         spin();
         return 0;
     }},
    {"spin_threads",
     [] {
         std::thread a(spin), b(spin), c(spin);
         spin();
         return 0;
     }},
    {"sleep",
     [] {
         sleep(1000);
         return 0;
     }},
    {"late",
     [] {
         std::cout << "answer" << std::endl;
         spin();
         return 0;
     }},
    {"stop",
     [] {
         raise(SIGSTOP);
         sleep(1000);
         return 0;
     }},
    {"ignore_signals",
     [] {
         for (int i = 1; i < 64; i++) signal(i, SIG_IGN);
         spin();
         return 0;
     }},
    {"close_and_spin",
     [] {
         close(0);
         close(1);
         close(2);
         spin();
         return 0;
     }},
    {"close_and_sleep",
     [] {
         close(0);
         close(1);
         close(2);
         sleep(1000);
         return 0;
     }},
    {"close_and_exit",
     [] {
         write(1, "x", 1);
         close(1);
         close(2);
         usleep(50000);
         return 7;
     }},
    // ---- families of processes
    {"family",
     [] {
         for (int i = 0; i < 3; i++)
             if (fork() == 0) wait_on();
         puts("started");
         return 0;
     }},
    {"orphans",
     [] {
         if (fork() == 0) {
             for (int i = 0; i < 3; i++)
                 if (fork() == 0) wait_on();
             _exit(0);
         }
         wait(nullptr);
         puts("started");
         return 0;
     }},
    {"leave_group",
     [] {
         if (fork() == 0) {
             setpgid(0, 0);
             setsid();
             if (fork() == 0) {
                 setpgid(0, 0);
                 wait_on();
             }
             _exit(0);
         }
         wait(nullptr);
         puts("started");
         return 0;
     }},
    {"family_waits",
     [] {
         if (fork() == 0)
             for (int i = 0; i < 3; i++)
                 if (fork() == 0) wait_on();
         wait_on();
         return 0;
     }},
    {"endless_output",
     [] {
         std::string line(1000, 'x');
         for (;;) std::cout << line << "\n";
         return 0;
     }},
    {"endless_errors",
     [] {
         std::string line(1000, 'x');
         for (;;) std::cerr << line << "\n";
         return 0;
     }},
    {"some_errors",
     [] {
         for (int i = 0; i < 20000; i++) fprintf(stderr, "error %d\n", i);
         puts("done");
         return 1;
     }},
};

int main(int, char** argv) {
    std::ios::sync_with_stdio(false);
    return programs.at(argv[1])();
}
