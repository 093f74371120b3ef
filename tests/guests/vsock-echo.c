/*
 * A program for a Linux guest, without a C library: vsock-echo connect PORT connects to the host, vsock-echo listen PORT
 * waits for one connection; either sends back what it gets until the other side ends.
 */
struct sockaddr_vm {
    unsigned short family, reserved;
    unsigned int port, cid;
    unsigned char zero[4];
};

enum { SYS_read, SYS_write, SYS_socket = 41, SYS_connect = 42, SYS_accept = 43, SYS_bind = 49, SYS_listen = 50, SYS_exit = 60 };
enum { AF_VSOCK = 40, SOCK_STREAM = 1, CID_ANY = -1, CID_HOST = 2 };

static long call(long number, long a, long b, long c)
{
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
    return result;
}

static void check(long result, const char *what)
{
    if (result >= 0) return;
    long length = 0;
    while (what[length]) length++;
    call(SYS_write, 2, (long)what, length);
    call(SYS_exit, 1, 0, 0);
}

static char buffer[100000];

__attribute__((used)) static void run(long *stack)
{
    char **arguments = (char **)(stack + 1);
    check(stack[0] == 3 ? 0 : -1, "usage: vsock-echo connect|listen PORT\n");
    struct sockaddr_vm address = { .family = AF_VSOCK };
    for (const char *digit = arguments[2]; *digit; digit++) address.port = address.port * 10 + (unsigned)(*digit - '0');
    long s = call(SYS_socket, AF_VSOCK, SOCK_STREAM, 0);
    check(s, "socket\n");
    if (arguments[1][0] == 'l') {
        address.cid = (unsigned)CID_ANY;
        check(call(SYS_bind, s, (long)&address, sizeof address), "bind\n");
        check(call(SYS_listen, s, 1, 0), "listen\n");
        call(SYS_write, 1, (long)"listening\n", 10);
        s = call(SYS_accept, s, 0, 0);
        check(s, "accept\n");
    } else {
        address.cid = CID_HOST;
        check(call(SYS_connect, s, (long)&address, sizeof address), "connect\n");
    }
    long count;
    while ((count = call(SYS_read, s, (long)buffer, sizeof buffer)) > 0) {
        for (long done = 0; done < count;) {
            long n = call(SYS_write, s, (long)buffer + done, count - done);
            check(n, "write\n");
            done += n;
        }
    }
    check(count, "read\n");
    call(SYS_exit, 0, 0, 0);
}

__asm__(".globl _start\n_start: mov %rsp, %rdi\n and $-16, %rsp\n call run\n");
