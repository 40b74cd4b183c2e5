// Attacks on a sandbox. `attacks NAME KEY=VALUE...` prints "ESCAPED: ..." where the attack reaches its aim: it checks
// that itself, so that the same program shows without a sandbox that it is one. Targets, as keys: `secret`, a file of
// the host; `writable`, one that anybody may write to; `folder`, where they are; `tcp` and `udp`, ports; `abstract` and
// `unix`, names of sockets; `pid`, a process; `threads`, more than there may be; `self`, this program, and
// `program`, one beside it.
#include <arpa/inet.h>
#include <dirent.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/netlink.h>
#include <netinet/in.h>
#include <sched.h>
#include <signal.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/msg.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <sstream>
#include <string>
#include <vector>

using std::string;

constexpr long MIB = 1 << 20;
std::map<string, string> target;

string read_all(const string& path) {
    std::ifstream file(path);
    std::stringstream text;
    text << file.rdbuf();
    return text.str();
}

string listing(const string& path) {
    string names;
    if (DIR* folder = opendir(path.c_str())) {
        while (dirent* entry = readdir(folder))
            if (entry->d_name[0] != '.') names += string(entry->d_name) + " ";
        closedir(folder);
    }
    return names;
}

// What a call gives when it succeeds.
string worked(long result, const string& what) { return result >= 0 ? what : ""; }

// Touch memory, so that it is taken.
string touched(void* memory, long size) {
    if (memory == MAP_FAILED || memory == nullptr) return "";
    memset(memory, 1, size);
    return std::to_string(size / MIB) + " MiB";
}

sockaddr_in address(const string& port) {
    sockaddr_in result{};
    result.sin_family = AF_INET;
    result.sin_port = htons(std::stoi(port));
    inet_pton(AF_INET, "127.0.0.1", &result.sin_addr);
    return result;
}

string connect_to(const sockaddr* where, socklen_t size, int family, int type) {
    int descriptor = socket(family, type, 0);
    if (descriptor < 0 || connect(descriptor, where, size) < 0) return "";
    return write(descriptor, "attack", 6) == 6 ? "connected and wrote" : "";
}

string connect_unix(const string& name, bool is_abstract) {
    sockaddr_un where{};
    where.sun_family = AF_UNIX;
    memcpy(where.sun_path + is_abstract, name.data(), name.size());
    return connect_to((sockaddr*)&where, offsetof(sockaddr_un, sun_path) + is_abstract + name.size(), AF_UNIX,
                      SOCK_STREAM);
}

string write_file(const string& path, long size = 1) {
    int descriptor = open(path.c_str(), O_WRONLY | O_CREAT, 0666);
    if (descriptor < 0) return "";
    std::vector<char> block(MIB, 'x');
    long written = 0;
    while (written < size) {
        long count = write(descriptor, block.data(), std::min(size - written, MIB));
        if (count <= 0) break;
        written += count;
    }
    close(descriptor);
    unlink(path.c_str());
    return written == size || size == 1 ? "wrote " + std::to_string(written) + " bytes to " + path : "";
}

const std::vector<string> PLACES = {"/tmp",    "/var/tmp", "/dev/shm", "/dev",     "/run", "/box",
                                    "/runner", "/",        "/usr",     "/usr/lib", "/etc", "/home",
                                    "/root",   "/var",     "/proc",    "/sys",     "."};

string in_some_place(long size) {
    for (auto& place : PLACES)
        if (string found = write_file(place + "/sandbox-attack-" + std::to_string(getpid()), size); !found.empty())
            return found;
    return write_file(target["folder"] + "/sandbox-attack", size);
}

int child() {
    usleep(1000);
    _exit(0);
}

string forked(long pid) {
    if (pid == 0) child();
    if (pid > 0) waitpid(pid, nullptr, 0);
    return worked(pid, "a process");
}

int idle(void*) {
    for (;;) pause();
}

pid_t parent() { return getppid(); }

// getpid by the number it has in the 32-bit table of calls.
int pid_by_interrupt() {
    long result = -1;
#ifdef __x86_64__
    asm volatile("int $0x80" : "=a"(result) : "a"(20L));
#endif
    return result;
}

struct Attack {
    string name;
    std::function<string()> run;
};

const std::vector<Attack> attacks = {
    // ---- network
    {"tcp",
     [] {
         auto where = address(target["tcp"]);
         return connect_to((sockaddr*)&where, sizeof where, AF_INET, SOCK_STREAM);
     }},
    {"udp",
     [] {
         auto where = address(target["udp"]);
         return connect_to((sockaddr*)&where, sizeof where, AF_INET, SOCK_DGRAM);
     }},
    {"unix_abstract", [] { return connect_unix(target["abstract"], true); }},
    {"unix_file", [] { return connect_unix(target["unix"], false); }},
    {"listen", [] { return worked(listen(socket(AF_INET, SOCK_STREAM, 0), 1), "a port"); }},
    {"netlink", [] { return worked(socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE), "netlink"); }},
    {"packet_socket", [] { return worked(socket(AF_PACKET, SOCK_RAW, 0), "raw packets"); }},
    {"socketpair",
     [] {
         int pair[2];
         return worked(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), "a pair of sockets");
     }},
    // ---- files that are read
    {"read_secret", [] { return read_all(target["secret"]); }},
    {"read_passwd", [] { return read_all("/etc/passwd").substr(0, 20); }},
    {"read_hostname", [] { return read_all("/etc/hostname"); }},
    {"list_folder_of_secret", [] { return listing(target["folder"]); }},
    {"list_homes", [] { return listing("/root") + listing("/home"); }},
    {"list_temporary", [] { return listing("/tmp") + listing("/var/tmp"); }},
    {"list_processes", [] { return listing("/proc").substr(0, 20); }},
    {"environ_of_host", [] { return read_all("/proc/" + target["pid"] + "/environ").substr(0, 20); }},
    {"environ_of_parent", [] { return read_all("/proc/" + std::to_string(parent()) + "/environ").substr(0, 20); }},
    {"command_of_parent", [] { return read_all("/proc/" + std::to_string(parent()) + "/cmdline").substr(0, 20); }},
    {"own_environment", [] { return string(getenv("SANDBOX_TEST_SECRET") ?: ""); }},
    {"relative_path", [] { return read_all("../../../../../../../../.." + target["secret"]); }},
    {"path_by_chdir",
     [] {
         chdir(target["folder"].c_str());
         return read_all("secret");
     }},
    {"mmap_memory_of_machine", [] { return worked(open("/dev/mem", O_RDONLY), "/dev/mem"); }},
    {"disk_device",
     [] {
         for (auto path : {"/dev/vda", "/dev/sda", "/dev/nvme0n1"})
             if (open(path, O_RDONLY) >= 0) return string(path);
         return string();
     }},
    {"handle",
     [] {
         file_handle* handle = (file_handle*)calloc(1, 256);
         handle->handle_bytes = 128;
         int mount;
         return worked(name_to_handle_at(AT_FDCWD, target["secret"].c_str(), handle, &mount, 0), "a file handle");
     }},
    // ---- files that are changed
    {"write_somewhere", [] { return in_some_place(1); }},
    {"fill_disk", [] { return in_some_place(100 * MIB); }},
    {"overwrite_secret", [] { return worked(open(target["writable"].c_str(), O_WRONLY), "opened to write"); }},
    {"truncate_by_reading",
     [] {
         open(target["writable"].c_str(), O_RDONLY | O_TRUNC);
         struct stat info;
         return stat(target["writable"].c_str(), &info) == 0 && info.st_size == 0 ? "emptied" : "";
     }},
    {"truncate", [] { return worked(truncate(target["writable"].c_str(), 0), "truncated"); }},
    {"overwrite_program",
     [] { return worked(open(target["program"].c_str(), O_WRONLY | O_APPEND), "opened to write"); }},
    {"chmod", [] { return worked(chmod(target["writable"].c_str(), 0777), "mode"); }},
    {"chown", [] { return worked(chown(target["writable"].c_str(), getuid(), getgid()), "owner"); }},
    {"times", [] { return worked(utimensat(AT_FDCWD, target["writable"].c_str(), nullptr, 0), "times"); }},
    {"xattr", [] { return worked(setxattr(target["writable"].c_str(), "user.attack", "x", 1, 0), "attribute"); }},
    {"symlink",
     [] { return worked(symlink(target["secret"].c_str(), (target["folder"] + "/symlink").c_str()), "a link"); }},
    {"hardlink",
     [] { return worked(link(target["secret"].c_str(), (target["folder"] + "/hardlink").c_str()), "a link"); }},
    {"mkdir", [] { return worked(mkdir((target["folder"] + "/made").c_str(), 0777), "a folder"); }},
    {"mkfifo", [] { return worked(mkfifo((target["folder"] + "/fifo").c_str(), 0777), "a pipe"); }},
    {"rename",
     [] { return worked(rename(target["writable"].c_str(), (target["folder"] + "/renamed").c_str()), "renamed"); }},
    {"unlink", [] { return worked(unlink(target["writable"].c_str()), "unlinked"); }},
    {"write_to_stdin", [] { return worked(pwrite(0, "attack", 6, 0) == 6 ? 0 : -1, "wrote to its input"); }},
    {"grow_stdin", [] { return worked(ftruncate(0, 64 * MIB), "grew its input"); }},
    {"named_memory",
     [] {
         int descriptor = shm_open("/sandbox-attack", O_RDWR | O_CREAT, 0666);
         shm_unlink("/sandbox-attack");
         return worked(descriptor, "shared memory");
     }},
    // ---- processes
    {"fork", [] { return forked(fork()); }},
    {"vfork",
     [] {
         int pid = vfork();
         if (pid == 0) _exit(0);
         return worked(pid, "a process");
     }},
    {"clone", [] { return forked(syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0)); }},
    {"clone3",
     [] {
         unsigned long arguments[11] = {0, 0, 0, 0, SIGCHLD};
         return forked(syscall(SYS_clone3, arguments, sizeof arguments));
     }},
    {"fork_bomb",
     [] {
         int count = 0;
         for (int i = 0; i < 300; i++) {
             int pid = fork();
             if (pid == 0) {
                 sleep(1);
                 _exit(0);
             }
             count += pid > 0;
         }
         return count ? std::to_string(count) + " processes" : "";
     }},
    {"daemon",
     [] {
         if (int pid = fork(); pid != 0) return worked(pid, "a daemon");
         setsid();
         if (fork() == 0) {
             close(0);
             close(1);
             close(2);
             sleep(20);
         }
         _exit(0);
     }},
    {"new_session", [] { return worked(setsid() >= 0 ? 0 : setpgid(0, 0), "left its group"); }},
    {"kill_parent", [] { return worked(kill(parent(), 0), "could signal"); }},
    {"kill_host", [] { return worked(kill(std::stoi(target["pid"]), 0), "could signal"); }},
    {"kill_all", [] { return worked(kill(-1, 0), "could signal"); }},
    {"kill_itself", [] { return worked(kill(getpid(), 0), "could signal"); }},
    {"tgkill", [] { return worked(syscall(SYS_tgkill, parent(), parent(), 0), "could signal"); }},
    {"tkill", [] { return worked(syscall(SYS_tkill, parent(), 0), "could signal"); }},
    {"queue_signal", [] { return worked(sigqueue(parent(), 0, {}), "could signal"); }},
    {"pidfd",
     [] {
         int descriptor = syscall(SYS_pidfd_open, parent(), 0);
         return worked(syscall(SYS_pidfd_send_signal, descriptor, 0, nullptr, 0), "could signal");
     }},
    {"signal_by_owner",
     [] {
         int pair[2];
         pipe(pair);
         return worked(fcntl(pair[0], F_SETOWN, parent()), "is a signal's source");
     }},
    {"signal_by_timer",
     [] {
         timer_t timer;
         sigevent event{};
         event.sigev_notify = SIGEV_SIGNAL;
         event.sigev_signo = SIGKILL;
         return worked(timer_create(CLOCK_REALTIME, &event, &timer), "a timer that kills");
     }},
    {"ptrace", [] { return worked(ptrace(PTRACE_SEIZE, parent(), 0, 0), "attached"); }},
    {"ptrace_me", [] { return worked(ptrace(PTRACE_TRACEME, 0, 0, 0), "traced"); }},
    {"read_parent",
     [] {
         char byte;
         iovec here{&byte, 1}, there{(void*)0x400000, 1};
         errno = 0;
         process_vm_readv(parent(), &here, 1, &there, 1, 0);
         return errno == EFAULT || errno == 0 ? "may read memory" : "";
     }},
    {"limits_of_parent",
     [] {
         rlimit limit;
         return worked(prlimit(parent(), RLIMIT_CPU, nullptr, &limit), "limits");
     }},
    {"priority_of_parent",
     [] { return worked(setpriority(PRIO_PROCESS, parent(), getpriority(PRIO_PROCESS, parent())), "priority"); }},
    {"affinity_of_parent",
     [] {
         cpu_set_t set;
         sched_getaffinity(0, sizeof set, &set);
         return worked(sched_setaffinity(parent(), sizeof set, &set), "affinity");
     }},
    {"realtime",
     [] {
         sched_param parameters{10};
         return worked(sched_setscheduler(0, SCHED_FIFO, &parameters), "realtime");
     }},
    {"nice",
     [] {
         errno = 0;
         int result = nice(-5);
         return errno == 0 ? "priority " + std::to_string(result) : "";
     }},
    {"no_death_with_parent", [] { return worked(prctl(PR_SET_PDEATHSIG, 0), "outlives its parent"); }},
    {"subreaper", [] { return worked(prctl(PR_SET_CHILD_SUBREAPER, 1), "adopts"); }},
    // ---- resources
    {"memory", [] { return touched(malloc(1024 * MIB), 1024 * MIB); }},
    {"shared_mapping",
     [] {
         return touched(mmap(nullptr, 1024 * MIB, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0),
                        1024 * MIB);
     }},
    {"many_mappings",
     [] {
         long count = 0;
         for (; count < 100; count++)
             if (touched(mmap(nullptr, 10 * MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), 10 * MIB)
                     .empty())
                 break;
         return count == 100 ? "1000 MiB" : "";
     }},
    {"system_v_memory",
     [] {
         int id = shmget(IPC_PRIVATE, MIB, IPC_CREAT | 0600);
         if (id >= 0) shmctl(id, IPC_RMID, nullptr);
         return worked(id, "shared memory");
     }},
    {"system_v_queue",
     [] {
         int id = msgget(IPC_PRIVATE, IPC_CREAT | 0600);
         if (id >= 0) msgctl(id, IPC_RMID, nullptr);
         return worked(id, "a queue");
     }},
    {"system_v_semaphore",
     [] {
         int id = semget(IPC_PRIVATE, 1, IPC_CREAT | 0600);
         if (id >= 0) semctl(id, 0, IPC_RMID);
         return worked(id, "a semaphore");
     }},
    {"posix_queue",
     [] {
         int id = syscall(SYS_mq_open, "sandbox-attack", O_RDWR | O_CREAT, 0600, nullptr);
         syscall(SYS_mq_unlink, "sandbox-attack");
         return worked(id, "a queue");
     }},
    {"memfd", [] { return worked(memfd_create("attack", 0), "a file in memory"); }},
    {"memfd_secret", [] { return worked(syscall(447, 0), "hidden memory"); }},
    {"huge_pipes",
     [] {
         long total = 0;
         for (int i = 0; i < 20; i++) {
             int pair[2];
             if (pipe(pair) == 0 && fcntl(pair[0], F_SETPIPE_SZ, MIB) > 0) total++;
         }
         return total ? std::to_string(total) + " MiB of the kernel" : "";
     }},
    {"lock_memory",
     [] {
         void* memory = malloc(MIB);
         return worked(mlock(memory, MIB), "locked");
     }},
    {"descriptors",
     [] {
         int count = 0;
         while (count < 2000 && open("/dev/null", O_RDONLY) >= 0) count++;
         return count > 300 ? std::to_string(count) + " descriptors" : "";
     }},
    {"threads",
     [] {
         int flags = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD;
         int wanted = std::stoi(target["threads"]), count = 0;
         while (count < wanted) {
             char* stack = (char*)mmap(nullptr, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
             if (stack == MAP_FAILED || clone(idle, stack + 8192, flags, nullptr) < 0) break;
             count++;
         }
         return count == wanted ? std::to_string(count) + " threads" : "";
     }},
    {"raise_limits",
     [] {
         string raised;
         for (int kind : {RLIMIT_AS, RLIMIT_FSIZE, RLIMIT_NPROC, RLIMIT_NOFILE, RLIMIT_CORE}) {
             rlimit limit{RLIM_INFINITY, RLIM_INFINITY};
             if (kind == RLIMIT_NOFILE) limit = {500000, 500000};
             if (setrlimit((__rlimit_resource)kind, &limit) == 0) raised += std::to_string(kind) + " ";
         }
         return raised;
     }},
    {"cpu_limit",
     [] {
         rlimit limit{1, 1};
         return worked(setrlimit(RLIMIT_CPU, &limit), "set its CPU limit, to look like killed from outside");
     }},
    // ---- more kernel
    {"user_namespace", [] { return worked(unshare(CLONE_NEWUSER), "a namespace"); }},
    {"clone_namespace", [] { return forked(syscall(SYS_clone, CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0)); }},
    {"thread_namespace", [] { return worked(unshare(CLONE_FS | CLONE_NEWNET), "a network"); }},
    {"setns", [] { return worked(setns(open("/proc/1/ns/net", O_RDONLY), 0), "another's network"); }},
    {"mount", [] { return worked(mount("none", target["folder"].c_str(), "tmpfs", 0, ""), "mounted"); }},
    {"open_tree", [] { return worked(syscall(428, AT_FDCWD, "/", 1), "cloned mounts"); }},
    {"chroot", [] { return worked(chroot("/"), "chroot"); }},
    {"io_uring",
     [] {
         char parameters[256] = {};
         return worked(syscall(425, 8, parameters), "io_uring");
     }},
    {"bpf",
     [] {
         char attributes[128] = {};
         errno = 0;
         syscall(SYS_bpf, 0, attributes, sizeof attributes);
         return errno != ENOSYS ? "reached" : "";
     }},
    {"perf",
     [] {
         char attributes[128] = {};
         errno = 0;
         syscall(SYS_perf_event_open, attributes, 0, -1, -1, 0);
         return errno != ENOSYS ? "reached" : "";
     }},
    {"keys", [] { return worked(syscall(SYS_keyctl, 0, -3, 1), "a keyring"); }},
    {"userfaultfd", [] { return worked(syscall(SYS_userfaultfd, 1), "userfaultfd"); }},
    {"fanotify",
     [] {
         errno = 0;
         syscall(SYS_fanotify_init, 0, 0);
         return errno != ENOSYS ? "reached" : "";
     }},
    {"inotify", [] { return worked(syscall(SYS_inotify_init1, 0), "inotify"); }},
    {"own_filter",
     [] {
         sock_filter rule{BPF_RET | BPF_K, 0, 0, 0x7fff0000};
         sock_fprog program{1, &rule};
         return worked(syscall(SYS_seccomp, 1, 0, &program), "a filter of its own");
     }},
    {"become_root",
     [] {
         setuid(0);
         setresuid(0, 0, 0);
         return geteuid() == 0 ? "is root" : "";
     }},
    {"capabilities", [] { return worked(prctl(PR_CAPBSET_READ, 21), "prctl"); }},
    {"hostname",
     [] {
         char name[256];
         gethostname(name, sizeof name);
         return worked(sethostname(name, strlen(name)), "hostname");
     }},
    {"clock",
     [] {
         timespec now;
         clock_gettime(CLOCK_REALTIME, &now);
         return worked(clock_settime(CLOCK_REALTIME, &now), "the clock");
     }},
    {"kernel_log", [] { return worked(syscall(SYS_syslog, 10, nullptr, 0), "the kernel's log"); }},
    {"devices",
     [] {
         string found;
         for (auto path : {"/dev/ptmx", "/dev/kvm", "/dev/fuse", "/dev/vsock", "/dev/vhost-vsock", "/dev/kmsg",
                           "/dev/tty", "/dev/tty0", "/dev/loop-control", "/dev/net/tun", "/dev/random", "/dev/zero"})
             if (open(path, O_RDWR | O_NOCTTY | O_NONBLOCK) >= 0) found += string(path) + " ";
         return found;
     }},
    {"type_into_terminal", [] { return worked(ioctl(0, 0x5412, "x"), "typed"); }},
#ifdef __x86_64__
    {"other_system_calls", [] { return worked(pid_by_interrupt(), "32-bit system calls"); }},
    {"x32_system_calls",
     [] {
         long pid = syscall(0x40000000 + SYS_getpid);
         return worked(pid, "x32 system calls");
     }},
#endif
    // ---- the runner
    {"inherited_descriptors",
     [] {
         string found;
         for (int i = 3; i < 1024; i++)
             if (fcntl(i, F_GETFD) >= 0) found += std::to_string(i) + " ";
         return found;
     }},
    {"forge_reply",
     [] {
         const char frame[] = "\x0f\0\0\0\0\0\0\0\0\0\0\0{\"exit_code\":0}";
         string written;
         for (int i = 0; i < 64; i++)
             if (i != 1 && i != 2 && write(i, frame, sizeof frame - 1) > 0) written += std::to_string(i) + " ";
         fwrite(frame, 1, sizeof frame - 1, stdout);
         return written;
     }},
    {"memory_of_itself", [] { return worked(open("/proc/self/mem", O_RDWR), "/proc/self/mem"); }},
    {"run_by_another_name",
     [] {
         const char* self = target["self"].c_str();
         if (target.count("again")) return string();
         execl(self, self, "fork", ("self=" + target["self"]).c_str(), "again=1", nullptr);
         return string();
     }},
    {"system_program",
     [] {
         string self = "/usr/bin/cat";
         execl(self.c_str(), "cat", target["secret"].c_str(), nullptr);
         return string();
     }},
    {"shell", [] { return system("true") == 0 ? "a shell" : ""; }},
};

int main(int count, char** arguments) {
    for (int i = 2; i < count; i++) {
        string argument = arguments[i];
        size_t equals = argument.find('=');
        target[argument.substr(0, equals)] = argument.substr(equals + 1);
    }
    for (auto& attack : attacks)
        if (attack.name == arguments[1]) {
            string found = attack.run();
            if (!found.empty()) printf("ESCAPED: %s\n", found.c_str());
            fflush(stdout);
            _exit(0);
        }
    return 2;
}
