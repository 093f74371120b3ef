/* x87: running an instruction on the host with the whole guest stack, state images, control instructions. */
#include "x87_int.h"

#if !defined(__x86_64__)
#error "x87 semantics here are those of an x86-64 host"
#endif

/*
 * x87_stub_reg: 512 stubs of 16 bytes, for D8-DF with each register ModRM byte, and x87_stub_mem: 64
 * for each memory form with the operand at RSI. Each loads the image at RDI, executes one
 * instruction and stores the image without waiting: an unmasked exception that has become pending
 * signals nothing, and FNSAVE leaves the host's x87 initialized. They return RFLAGS.
 */
__asm__(
    ".text\n"
    ".p2align 4\n"
    ".type x87_stub_reg, @function\n"
    "x87_stub_reg:\n"
    ".set x87_stub_byte, 0xd8\n"
    ".rept 8\n"
    ".set x87_stub_modrm, 0xc0\n"
    ".rept 64\n"
    ".byte 0xdd, 0x27, x87_stub_byte, x87_stub_modrm, 0xdd, 0x37\n" /* frstor (%rdi); insn; fnsave (%rdi) */
    "pushfq\n"
    "popq %rax\n"
    "ret\n"
    ".p2align 4\n"
    ".set x87_stub_modrm, x87_stub_modrm + 1\n"
    ".endr\n"
    ".set x87_stub_byte, x87_stub_byte + 1\n"
    ".endr\n"
    ".type x87_stub_mem, @function\n"
    "x87_stub_mem:\n"
    ".set x87_stub_byte, 0xd8\n"
    ".rept 8\n"
    ".set x87_stub_modrm, 0x06\n"
    ".rept 8\n"
    ".byte 0xdd, 0x27, x87_stub_byte, x87_stub_modrm, 0xdd, 0x37\n"
    "pushfq\n"
    "popq %rax\n"
    "ret\n"
    ".p2align 4\n"
    ".set x87_stub_modrm, x87_stub_modrm + 8\n"
    ".endr\n"
    ".set x87_stub_byte, x87_stub_byte + 1\n"
    ".endr\n"
    ".size x87_stub_mem, . - x87_stub_mem\n"
    /* x87_stub_enter(image, operand, rflags, stub) */
    ".type x87_stub_enter, @function\n"
    "x87_stub_enter:\n"
    "pushq %rdx\n"
    "popfq\n"
    "jmp *%rcx\n"
    ".size x87_stub_enter, . - x87_stub_enter\n"
    ".size x87_stub_reg, x87_stub_mem - x87_stub_reg\n");
typedef uint64_t x87_stub(struct x87_image *img, void *mem);
extern const uint8_t x87_stub_reg[512][16] __attribute__((visibility("hidden")));
extern const uint8_t x87_stub_mem[64][16] __attribute__((visibility("hidden")));
extern uint64_t x87_stub_enter(struct x87_image *img, void *mem, uint64_t rflags, const uint8_t *stub)
    __attribute__((visibility("hidden")));

#define CW(n) (0x7f | (n) << 8)
const uint16_t x87_masked_cw[16] = { CW(0), CW(1), CW(2), CW(3), CW(4), CW(5), CW(6), CW(7),
                                     CW(8), CW(9), CW(10), CW(11), CW(12), CW(13), CW(14), CW(15) };

/* ---- the general way ---- */
void x87_host_run(const struct fpu *f, uint32_t opc, void *mem, uint32_t *status, struct x87_image *img)
{
    memset(img, 0, offsetof(struct x87_image, st));
    img->cw = f->fcw;
    img->sw = f->fsw;
    for (uint32_t k = 0; k < 8; k++) {
        if (!((f->tags >> k) & 1)) img->tags |= (uint16_t)(3u << (2 * k));
        memcpy(img->st[k], f->r[st_index(f, k)], 10);
    }
    const uint8_t *stub = (opc & 0xc0) == 0xc0 ? x87_stub_reg[(opc >> 8 & 7) * 64 + (opc & 63)]
                                               : x87_stub_mem[(opc >> 8 & 7) * 8 + (opc >> 3 & 7)];
    *status = (uint32_t)x87_stub_enter(img, mem, (*status & FLAGS_STATUS) | 0x202u, stub) & FLAGS_STATUS;
}

void x87_image_commit(struct fpu *f, const struct x87_image *img)
{
    f->fsw = img->sw;
    x87_set_full_tags(f, img->tags);
    for (uint32_t k = 0; k < 8; k++) memcpy(f->r[st_index(f, k)], img->st[k], 10);
}

static bool opc_uses_flags(uint32_t opc)
{
    uint32_t byte = opc >> 8 & 7, reg = opc >> 3 & 7;
    return (opc & 0xc0) == 0xc0 && (byte == 3 || byte == 7) && (reg == 5 || reg == 6);
}

NOINLINE int x87_whole(struct kvs_vcpu *c, const struct kvs_insn *i, uint32_t opc, int size)
{
    struct fpu *f = &c->fpu;
    struct x87_image img;
    _Alignas(16) uint8_t mem[16] = { 0 };
    uint32_t status = flags_status(c);
    int st = ST_OK;
    if (x87_pending(f)) return raise_vector(c, EXC_MF);
    if (opc & OPC_FETCHED) memcpy(mem, c->rmw.data, sizeof mem);
    else if (size > 0 && (st = insn_read(c, i, mem, (uint32_t)size)) != ST_OK) return st;
    x87_host_run(f, opc, mem, &status, &img);
    /* Unmasked invalid, overflow and underflow store nothing and pop nothing.
     * SDM 1 "x87 FPU Exception Conditions" */
    if (size < 0 && (img.sw & ~(uint32_t)f->fcw & (FSW_IE | FSW_OE | FSW_UE))) {
        uint64_t la; /* a fault of the operand comes first even so */
        st = seg_to_linear(c, i->seg, insn_offset(c, i), (uint32_t)-size, ACC_W, &la);
        if (st == ST_OK) st = lwrite_check(c, la, (uint32_t)-size, LA_USER_RULES);
        if (st != ST_OK) return st;
    } else if (size < 0) {
        st = insn_write(c, i, mem, (uint32_t)-size);
        if (x87_not_done(st)) return st;
        st = x87_stored(c, st);
    }
    x87_image_commit(f, &img);
    if (opc_uses_flags(opc)) flags_set_status(c, status);
    if (size) x87_note_mem(c, i);
    else x87_note(c, i);
    return st;
}

int x87_slow(OPARGS, uint32_t opc, int size)
{
    int st = x87_whole(c, i, opc, size);
    if (UNLIKELY(st != ST_OK)) return leave(c, i, budget, st);
    NEXT();
}

int x87_fetch(OPARGS, uint32_t size, x87_body *body)
{
    int st = x87_pending(&c->fpu) ? raise_vector(c, EXC_MF) : insn_read(c, i, c->rmw.data, size);
    if (UNLIKELY(st != ST_OK)) return leave(c, i, budget, st);
    return body(c, i, budget, c->rmw.data);
}

void x87_host_clean(void)
{
    uint16_t sw;
    __asm__ volatile("fnstsw %0" : "=a"(sw));
    if (sw & FSW_FLAGS) __asm__ volatile("fninit");
}

/* ---- state ---- */
uint16_t x87_full_tags(const struct fpu *f)
{
    uint32_t tags = 0;
    for (uint32_t k = 0; k < 8; k++) {
        uint64_t m = ld64(f->r[k]);
        uint32_t e = ld16(f->r[k] + 8) & 0x7fffu, tag = 0;
        if (!((f->tags >> k) & 1)) tag = 3;
        else if (e == 0 && m == 0) tag = 1;
        else if (e == 0 || e == 0x7fff || !(m >> 63)) tag = 2;
        tags |= tag << (2 * k);
    }
    return (uint16_t)tags;
}

void x87_set_full_tags(struct fpu *f, uint16_t tags)
{
    f->tags = 0;
    for (uint32_t k = 0; k < 8; k++)
        if (((tags >> (2 * k)) & 3) != 3) f->tags |= (uint8_t)(1u << k);
}

void x87_init(struct fpu *f)
{
    f->fcw = FCW_INIT;
    f->fsw = 0;
    f->tags = 0;
    f->fop = f->fcs = f->fds = 0;
    f->fip = f->fdp = 0;
}

/* SDM 1 "x87 FPU State Image": the layouts by mode and operand size. */
uint32_t x87_env_store(const struct fpu *f, uint32_t osize, bool real, uint8_t *p)
{
    uint32_t ip = (uint32_t)f->fip, dp = (uint32_t)f->fdp, cs = f->fcs, ds = f->fds, op = f->fop & 0x7ffu;
    if (real) {
        ip += cs << 4;
        dp += ds << 4;
    }
    if (osize == 2) {
        st16(p, f->fcw);
        st16(p + 2, f->fsw);
        st16(p + 4, x87_full_tags(f));
        st16(p + 6, (uint16_t)ip);
        st16(p + 8, (uint16_t)(real ? (ip >> 16 & 0xf) << 12 | op : cs));
        st16(p + 10, (uint16_t)dp);
        st16(p + 12, (uint16_t)(real ? (dp >> 16 & 0xf) << 12 : ds));
        return 14;
    }
    st32(p, 0xffff0000u | f->fcw);
    st32(p + 4, 0xffff0000u | f->fsw);
    st32(p + 8, 0xffff0000u | x87_full_tags(f));
    st32(p + 12, real ? 0xffff0000u | (ip & 0xffff) : ip);
    st32(p + 16, real ? (ip >> 16) << 12 | op : op << 16 | cs);
    st32(p + 20, real ? 0xffff0000u | (dp & 0xffff) : dp);
    st32(p + 24, real ? (dp >> 16) << 12 : 0xffff0000u | ds);
    return 28;
}

void x87_env_load(struct fpu *f, uint32_t osize, bool real, const uint8_t *p)
{
    uint32_t w = osize == 2 ? 2 : 4;
    f->fcw = ld16(p);
    f->fsw = ld16(p + w);
    x87_set_full_tags(f, ld16(p + 2 * w));
    x87_update_es(f);
    f->fcs = f->fds = 0;
    if (w == 2) {
        uint32_t hi = ld16(p + 8), dhi = ld16(p + 12);
        f->fip = ld16(p + 6);
        f->fdp = ld16(p + 10);
        if (real) {
            f->fip |= (hi >> 12) << 16;
            f->fdp |= (dhi >> 12) << 16;
            f->fop = hi & 0x7ff;
        } else {
            f->fcs = (uint16_t)hi;
            f->fds = (uint16_t)dhi;
            f->fop = 0; /* this layout has no opcode */
        }
        return;
    }
    uint32_t hi = ld32(p + 16), dhi = ld32(p + 24);
    if (real) {
        f->fip = ld16(p + 12) | (hi >> 12 & 0xffffu) << 16;
        f->fdp = ld16(p + 20) | (dhi >> 12 & 0xffffu) << 16;
        f->fop = hi & 0x7ff;
    } else {
        f->fip = ld32(p + 12);
        f->fdp = ld32(p + 20);
        f->fcs = (uint16_t)hi;
        f->fds = (uint16_t)dhi;
        f->fop = hi >> 16 & 0x7ff;
    }
}

/* ---- control instructions ---- */
static bool real_layout(const struct kvs_vcpu *c) { return is_real_or_v86(c); }

OPX(fldcw)
{
    UNUSED_OPARGS;
    uint16_t cw;
    if (x87_pending(&c->fpu)) return raise_vector(c, EXC_MF);
    int st = insn_read(c, i, &cw, 2);
    if (st != ST_OK) return st;
    c->fpu.fcw = cw;
    x87_update_es(&c->fpu);
    return ST_OK;
}

OPX(fnstcw)
{
    UNUSED_OPARGS;
    return x87_stored(c, insn_write(c, i, &c->fpu.fcw, 2));
}

OPX(fnstsw_m16)
{
    UNUSED_OPARGS;
    return x87_stored(c, insn_write(c, i, &c->fpu.fsw, 2));
}

OP(fnstsw_ax)
{
    *(uint16_t *)&c->gpr[RAX] = c->fpu.fsw;
    NEXT();
}

OPX(fnclex)
{
    UNUSED_OPARGS;
    c->fpu.fsw &= (uint16_t)~(FSW_FLAGS | FSW_SF | FSW_ES | FSW_B);
    return ST_OK;
}

OPX(fninit)
{
    UNUSED_OPARGS;
    x87_init(&c->fpu);
    return ST_OK;
}

/* Environment and state images are arrays of words or doublewords. */
static int env_alignment(struct kvs_vcpu *c, const struct kvs_insn *i, int access)
{
    return seg_check_alignment(c, i->seg, insn_offset(c, i), INSN_OSIZE(i) == 2 ? 2 : 4, access);
}

OPX(fldenv)
{
    UNUSED_OPARGS;
    uint8_t env[28];
    if (x87_pending(&c->fpu)) return raise_vector(c, EXC_MF);
    int st = env_alignment(c, i, ACC_R);
    if (st == ST_OK) st = insn_read(c, i, env, INSN_OSIZE(i) == 2 ? 14 : 28);
    if (st != ST_OK) return st;
    x87_env_load(&c->fpu, INSN_OSIZE(i), real_layout(c), env);
    return ST_OK;
}

OPX(fnstenv)
{
    UNUSED_OPARGS;
    uint8_t env[28];
    uint32_t size = x87_env_store(&c->fpu, INSN_OSIZE(i), real_layout(c), env);
    int st = env_alignment(c, i, ACC_W);
    if (st == ST_OK) st = insn_write(c, i, env, size);
    if (x87_not_done(st)) return st;
    c->fpu.fcw |= FSW_FLAGS; /* all masked, so ES and B go too */
    x87_update_es(&c->fpu);
    return x87_stored(c, st);
}

OPX(frstor)
{
    UNUSED_OPARGS;
    uint8_t image[108];
    struct fpu *f = &c->fpu;
    uint32_t size = INSN_OSIZE(i) == 2 ? 14 : 28;
    if (x87_pending(f)) return raise_vector(c, EXC_MF);
    int st = env_alignment(c, i, ACC_R);
    if (st == ST_OK) st = insn_read(c, i, image, size + 80);
    if (st != ST_OK) return st;
    x87_env_load(f, INSN_OSIZE(i), real_layout(c), image);
    for (uint32_t k = 0; k < 8; k++) memcpy(st_reg(f, k), image + size + 10 * k, 10);
    return ST_OK;
}

OPX(fnsave)
{
    UNUSED_OPARGS;
    uint8_t image[108];
    struct fpu *f = &c->fpu;
    uint32_t size = x87_env_store(f, INSN_OSIZE(i), real_layout(c), image);
    for (uint32_t k = 0; k < 8; k++) memcpy(image + size + 10 * k, st_reg(f, k), 10);
    int st = env_alignment(c, i, ACC_W);
    if (st == ST_OK) st = insn_write(c, i, image, size + 80);
    if (x87_not_done(st)) return st;
    x87_init(f);
    return x87_stored(c, st);
}

/* 8087 and 80287 control instructions: NOPs that do not wait. SDM 3B "Obsolete Instructions and Undefined Opcodes" */
OP(fneni) { NEXT(); }
OP(fndisi) { NEXT(); }
OP(fnsetpm) { NEXT(); }

/*
 * With CR0.NE clear a PC routes the error to IRQ 13 through FERR#, a wire this machine does not
 * have: #MF is raised whatever NE says. SDM 1 "MS-DOS Compatibility Sub-mode"
 */
OPX(fwait)
{
    UNUSED_OPARGS;
    if ((c->cr0 & (CR0_MP | CR0_TS)) == (CR0_MP | CR0_TS)) return raise_vector(c, EXC_NM);
    return x87_pending(&c->fpu) ? raise_vector(c, EXC_MF) : ST_OK;
}

/* ---- stack management and everything else that runs whole ---- */
#define WHOLE(name, byte, modrm) OP(name) { X87_SLOW(OPC(byte, modrm), 0); }
#define WHOLE_ST(name, byte, modrm) OP(name) { X87_SLOW(OPC(byte, (modrm) + i->dst), 0); }
#define WHOLE_MEM(name, byte, ext, size) OP(name) { X87_SLOW(OPC_MEM(byte, ext), size); }
WHOLE(fnop, 0xd9, 0xd0)
WHOLE(fptan, 0xd9, 0xf2)
WHOLE(fxtract, 0xd9, 0xf4)
WHOLE(fdecstp, 0xd9, 0xf6)
WHOLE(fincstp, 0xd9, 0xf7)
WHOLE(fsincos, 0xd9, 0xfb)
WHOLE_ST(ffree, 0xdd, 0xc0)
WHOLE_ST(ffreep, 0xdf, 0xc0)
WHOLE_ST(fxch4, 0xdd, 0xc8)
WHOLE_ST(fxch7, 0xdf, 0xc8)
WHOLE_ST(fstp1, 0xd9, 0xd8)
WHOLE_ST(fstp8, 0xdf, 0xd0)
WHOLE_ST(fstp9, 0xdf, 0xd8)
WHOLE_ST(fcom2, 0xdc, 0xd0)
WHOLE_ST(fcomp3, 0xdc, 0xd8)
WHOLE_ST(fcomp5, 0xde, 0xd0)
WHOLE_MEM(fbld, 0xdf, 4, 10)
WHOLE_MEM(fbstp, 0xdf, 6, -10)
