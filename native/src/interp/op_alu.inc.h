/* Forms of two-operand, unary, shift and move instructions. Included with W = 8, 16, 32, 64. */
#define CAT_(a, b, c) a##b##c
#define CAT(a, b, c) CAT_(a, b, c)
#define T CAT(uint, W, _t)
#define BYTES (W / 8)
#if W == 8
#define GET(n) REG8(n)
#define SET(n, v) (REG8(n) = (v))
#elif W == 16
#define GET(n) REG16(n)
#define SET(n, v) (REG16(n) = (v))
#elif W == 32
#define GET(n) REG32(n)
#define SET(n, v) SET32(n, v)
#else
#define GET(n) REG64(n)
#define SET(n, v) (REG64(n) = (v))
#endif
#define N(op, form) CAT(op, W, form)
#define SEM(op) CAT(sem_##op, W, )

#define ALU2_FORMS(op)                                                                            \
    OP(N(op, _rr)) { SET(i->dst, SEM(op)(&c->fl, GET(i->dst), GET(i->src))); NEXT(); }            \
    OP(N(op, _ri)) { SET(i->dst, SEM(op)(&c->fl, GET(i->dst), (T)i->imm)); NEXT(); }              \
    OPX(N(op, _rm_slow))                                                                          \
    {                                                                                             \
        T v;                                                                                      \
        int st = insn_read(c, i, &v, BYTES);                                                      \
        if (st == ST_OK) SET(i->dst, SEM(op)(&c->fl, GET(i->dst), v));                            \
        return st;                                                                                \
    }                                                                                             \
    OP(N(op, _rm))                                                                                \
    {                                                                                             \
        FAST_HOST(T, p, TLB_R, CAT(op_##op, W, _rm_slow));      \
        SET(i->dst, SEM(op)(&c->fl, GET(i->dst), *p));                                            \
        NEXT();                                                                                   \
    }                                                                                             \
    OP(N(op, _rmx))                                                                                \
    {                                                                                             \
        FAST_HOST_X(T, p, TLB_R, CAT(op_##op, W, _rm_slow));      \
        SET(i->dst, SEM(op)(&c->fl, GET(i->dst), *p));                                            \
        NEXT();                                                                                   \
    }                                                                                             \
    OPX(N(op, _mr_slow))                                                                          \
    {                                                                                             \
        int st = insn_rmw_begin(c, i, BYTES);                                                     \
        if (st != ST_OK) return st;                                                               \
        *(T *)c->rmw.data = SEM(op)(&c->fl, *(T *)c->rmw.data, GET(i->src));                      \
        vrmw_end(c);                                                                              \
        return ST_OK;                                                                             \
    }                                                                                             \
    OP(N(op, _mr))                                                                                \
    {                                                                                             \
        FAST_HOST(T, p, TLB_W, CAT(op_##op, W, _mr_slow));      \
        *p = SEM(op)(&c->fl, *p, GET(i->src));                                                    \
        NEXT();                                                                                   \
    }                                                                                             \
    OP(N(op, _mrx))                                                                                \
    {                                                                                             \
        FAST_HOST_X(T, p, TLB_W, CAT(op_##op, W, _mr_slow));      \
        *p = SEM(op)(&c->fl, *p, GET(i->src));                                                    \
        NEXT();                                                                                   \
    }                                                                                             \
    OPX(N(op, _mi_slow))                                                                          \
    {                                                                                             \
        int st = insn_rmw_begin(c, i, BYTES);                                                     \
        if (st != ST_OK) return st;                                                               \
        *(T *)c->rmw.data = SEM(op)(&c->fl, *(T *)c->rmw.data, (T)i->imm);                        \
        vrmw_end(c);                                                                              \
        return ST_OK;                                                                             \
    }                                                                                             \
    OP(N(op, _mi))                                                                                \
    {                                                                                             \
        FAST_HOST(T, p, TLB_W, CAT(op_##op, W, _mi_slow));      \
        *p = SEM(op)(&c->fl, *p, (T)i->imm);                                                      \
        NEXT();                                                                                   \
    }                                                                                             \
    OP(N(op, _mix))                                                                                \
    {                                                                                             \
        FAST_HOST_X(T, p, TLB_W, CAT(op_##op, W, _mi_slow));      \
        *p = SEM(op)(&c->fl, *p, (T)i->imm);                                                      \
        NEXT();                                                                                   \
    }                                                                                             \
    OPX(N(op, _lock))                                                                             \
    {                                                                                             \
        T b = i->src == INSN_MEM ? (T)i->imm : GET(i->src);                                       \
        int st = vrmw_begin_locked(c, i->seg, insn_offset(c, i), BYTES);                          \
        if (st != ST_OK) return st;                                                               \
        T *p = c->rmw.host ? (T *)c->rmw.host : (T *)c->rmw.data;                                 \
        T old = __atomic_load_n(p, __ATOMIC_RELAXED), now;                                        \
        uint16_t fl;                                                                              \
        do {                                                                                      \
            fl = c->fl;                                                                           \
            now = SEM(op)(&fl, old, b);                                                           \
        } while (!__atomic_compare_exchange_n(p, &old, now, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED)); \
        c->fl = fl;                                                                               \
        vrmw_end_locked(c);                                                                       \
        return ST_OK;                                                                             \
    }

ALU2_FORMS(add)
ALU2_FORMS(or)
ALU2_FORMS(adc)
ALU2_FORMS(sbb)
ALU2_FORMS(and)
ALU2_FORMS(sub)
ALU2_FORMS(xor)

/* CMP and TEST read only. */
#define CMP_FORMS(op)                                                                             \
    OP(N(op, _rr)) { SEM(op)(&c->fl, GET(i->dst), GET(i->src)); NEXT(); }                         \
    OP(N(op, _ri)) { SEM(op)(&c->fl, GET(i->dst), (T)i->imm); NEXT(); }                           \
    OPX(N(op, _m_slow))                                                                           \
    {                                                                                             \
        T v;                                                                                      \
        int st = insn_read(c, i, &v, BYTES);                                                      \
        if (st != ST_OK) return st;                                                               \
        if (i->dst != INSN_MEM) SEM(op)(&c->fl, GET(i->dst), v);                                  \
        else SEM(op)(&c->fl, v, i->src == INSN_MEM ? (T)i->imm : GET(i->src));                    \
        return ST_OK;                                                                             \
    }                                                                                             \
    OP(N(op, _rm))                                                                                \
    {                                                                                             \
        FAST_HOST(T, p, TLB_R, CAT(op_##op, W, _m_slow));      \
        SEM(op)(&c->fl, GET(i->dst), *p);                                                         \
        NEXT();                                                                                   \
    }                                                                                             \
    OP(N(op, _rmx))                                                                                \
    {                                                                                             \
        FAST_HOST_X(T, p, TLB_R, CAT(op_##op, W, _m_slow));      \
        SEM(op)(&c->fl, GET(i->dst), *p);                                                         \
        NEXT();                                                                                   \
    }                                                                                             \
    OP(N(op, _mr))                                                                                \
    {                                                                                             \
        FAST_HOST(T, p, TLB_R, CAT(op_##op, W, _m_slow));      \
        SEM(op)(&c->fl, *p, GET(i->src));                                                         \
        NEXT();                                                                                   \
    }                                                                                             \
    OP(N(op, _mrx))                                                                                \
    {                                                                                             \
        FAST_HOST_X(T, p, TLB_R, CAT(op_##op, W, _m_slow));      \
        SEM(op)(&c->fl, *p, GET(i->src));                                                         \
        NEXT();                                                                                   \
    }                                                                                             \
    OP(N(op, _mi))                                                                                \
    {                                                                                             \
        FAST_HOST(T, p, TLB_R, CAT(op_##op, W, _m_slow));      \
        SEM(op)(&c->fl, *p, (T)i->imm);                                                           \
        NEXT();                                                                                   \
    }                                                                                             \
    OP(N(op, _mix))                                                                                \
    {                                                                                             \
        FAST_HOST_X(T, p, TLB_R, CAT(op_##op, W, _m_slow));      \
        SEM(op)(&c->fl, *p, (T)i->imm);                                                           \
        NEXT();                                                                                   \
    }
CMP_FORMS(cmp)
CMP_FORMS(test)

#define UNARY_FORMS(op)                                                                           \
    OP(N(op, _r)) { SET(i->dst, SEM(op)(&c->fl, GET(i->dst))); NEXT(); }                          \
    OPX(N(op, _m_slow))                                                                           \
    {                                                                                             \
        int st = insn_rmw_begin(c, i, BYTES);                                                     \
        if (st != ST_OK) return st;                                                               \
        *(T *)c->rmw.data = SEM(op)(&c->fl, *(T *)c->rmw.data);                                   \
        vrmw_end(c);                                                                              \
        return ST_OK;                                                                             \
    }                                                                                             \
    OP(N(op, _m))                                                                                 \
    {                                                                                             \
        FAST_HOST(T, p, TLB_W, CAT(op_##op, W, _m_slow));      \
        *p = SEM(op)(&c->fl, *p);                                                                 \
        NEXT();                                                                                   \
    }                                                                                             \
    OP(N(op, _mx))                                                                                 \
    {                                                                                             \
        FAST_HOST_X(T, p, TLB_W, CAT(op_##op, W, _m_slow));      \
        *p = SEM(op)(&c->fl, *p);                                                                 \
        NEXT();                                                                                   \
    }                                                                                             \
    OPX(N(op, _lock))                                                                             \
    {                                                                                             \
        int st = vrmw_begin_locked(c, i->seg, insn_offset(c, i), BYTES);                          \
        if (st != ST_OK) return st;                                                               \
        T *p = c->rmw.host ? (T *)c->rmw.host : (T *)c->rmw.data;                                 \
        T old = __atomic_load_n(p, __ATOMIC_RELAXED), now;                                        \
        uint16_t fl;                                                                              \
        do {                                                                                      \
            fl = c->fl;                                                                           \
            now = SEM(op)(&fl, old);                                                              \
        } while (!__atomic_compare_exchange_n(p, &old, now, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED)); \
        c->fl = fl;                                                                               \
        vrmw_end_locked(c);                                                                       \
        return ST_OK;                                                                             \
    }
UNARY_FORMS(inc)
UNARY_FORMS(dec)
UNARY_FORMS(neg)
UNARY_FORMS(not)

/* _ri: count in imm, masked and not zero; _rz: zero. _rc: CL. Memory forms take all. */
#define SHIFT_FORMS(op, nz)                                                                       \
    OP(N(op, _ri)) { SET(i->dst, SEM(nz)(&c->fl, GET(i->dst), (uint8_t)i->imm)); NEXT(); }        \
    OP(N(op, _rz)) { SET(i->dst, GET(i->dst)); NEXT(); }                                          \
    OP(N(op, _rc)) { SET(i->dst, SEM(op)(&c->fl, GET(i->dst), REG8(RCX * 8))); NEXT(); }          \
    OPX(N(op, _m_slow))                                                                           \
    {                                                                                             \
        uint8_t count = i->src == RCX ? REG8(RCX * 8) : (uint8_t)i->imm;                          \
        int st = insn_rmw_begin(c, i, BYTES);                                                     \
        if (st != ST_OK) return st;                                                               \
        *(T *)c->rmw.data = SEM(op)(&c->fl, *(T *)c->rmw.data, count);                            \
        vrmw_end(c);                                                                              \
        return ST_OK;                                                                             \
    }                                                                                             \
    OP(N(op, _m))                                                                                 \
    {                                                                                             \
        FAST_HOST(T, p, TLB_W, CAT(op_##op, W, _m_slow));      \
        *p = SEM(op)(&c->fl, *p, i->src == RCX ? REG8(RCX * 8) : (uint8_t)i->imm);                \
        NEXT();                                                                                   \
    }                                                                                             \
    OP(N(op, _mx))                                                                                 \
    {                                                                                             \
        FAST_HOST_X(T, p, TLB_W, CAT(op_##op, W, _m_slow));      \
        *p = SEM(op)(&c->fl, *p, i->src == RCX ? REG8(RCX * 8) : (uint8_t)i->imm);                \
        NEXT();                                                                                   \
    }
SHIFT_FORMS(rol, rol)
SHIFT_FORMS(ror, ror)
SHIFT_FORMS(rcl, rcl)
SHIFT_FORMS(rcr, rcr)
SHIFT_FORMS(shl, shl_nz)
SHIFT_FORMS(shr, shr_nz)
SHIFT_FORMS(sar, sar_nz)

OP(N(mov, _rr)) { SET(i->dst, GET(i->src)); NEXT(); }
OP(N(mov, _ri)) { SET(i->dst, (T)i->imm); NEXT(); }
OPX(N(mov, _rm_slow))
{
    T v;
    int st = insn_read(c, i, &v, BYTES);
    if (st == ST_OK) SET(i->dst, v);
    return st;
}
OP(N(mov, _rm))
{
    FAST_HOST(T, p, TLB_R, N(op_mov, _rm_slow));
    SET(i->dst, *p);
    NEXT();
}
OP(N(mov, _rmx))
{
    FAST_HOST_X(T, p, TLB_R, N(op_mov, _rm_slow));
    SET(i->dst, *p);
    NEXT();
}
OPX(N(mov, _m_slow))
{
    T v = i->src == INSN_MEM ? (T)i->imm : GET(i->src);
    return insn_write(c, i, &v, BYTES);
}
OP(N(mov, _mr))
{
    FAST_HOST(T, p, TLB_W, N(op_mov, _m_slow));
    *p = GET(i->src);
    NEXT();
}
OP(N(mov, _mrx))
{
    FAST_HOST_X(T, p, TLB_W, N(op_mov, _m_slow));
    *p = GET(i->src);
    NEXT();
}
OP(N(mov, _mi))
{
    FAST_HOST(T, p, TLB_W, N(op_mov, _m_slow));
    *p = (T)i->imm;
    NEXT();
}
OP(N(mov, _mix))
{
    FAST_HOST_X(T, p, TLB_W, N(op_mov, _m_slow));
    *p = (T)i->imm;
    NEXT();
}

#undef ALU2_FORMS
#undef CMP_FORMS
#undef UNARY_FORMS
#undef SHIFT_FORMS
#undef CAT_
#undef CAT
#undef T
#undef BYTES
#undef GET
#undef SET
#undef N
#undef SEM
#undef W
