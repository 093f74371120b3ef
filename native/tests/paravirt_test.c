/* End of interrupt through memory, steal time, and the targets of hypercalls. KVM documentation "KVM-specific MSRs" */
#include "irqchip_test.h"

#define WORD 0x1000u
static struct kvs_vm *vm;
static struct kvs_vcpu *c;

static bool offered(void) { return guest_memory[WORD] & 1; }
static void guest_eoi(void) /* as Linux does it */
{
    if (offered())
        guest_memory[WORD] &= 0xfe;
    else
        apic(c, 0xb0, 0);
}
static void edge(uint32_t vector) { apic(c, 0x300, 0x40000 | vector); }
static uint32_t isr(uint32_t v) { return apic_rd(c, 0x100 + (v >> 5) * 16) >> (v & 31) & 1; }

static void start(void)
{
    vm = machine(2, KVS_CLOCK_VIRTUAL, 0);
    c = vm->vcpus[0];
    enable(c);
    enable(vm->vcpus[1]);
    apic(c, 0x350, 0x10000);
    memset(guest_memory, 0, sizeof guest_memory);
    guest_memory[WORD] = 0xf0;
    CHECK_EQ(pv_eoi_enable(c, WORD | 1, false), 0);
}

static void test_pv_eoi(void)
{
    start();
    struct kvs_msi msi = { .address_lo = 0xfee00000 };
    edge(0x50);
    CHECK(!offered());
    CHECK_EQ(take(c), 0x50);
    CHECK_EQ(guest_memory[WORD], 0xf1); /* the other bits are not ours */
    guest_eoi();
    CHECK_EQ(isr(0x50), 0); /* whoever looks finds it ended */
    edge(0x50);
    CHECK_EQ(take(c), 0x50);

    /* Ended, and then something lower arrives from elsewhere: the vCPU is told to look. */
    guest_eoi();
    pv_eoi_sync(c);
    edge(0x50);
    CHECK_EQ(take(c), 0x50);
    guest_eoi();
    atomic_store(&c->requests, 0);
    msi.data = 0x41;
    CHECK_EQ(irqchip_send_msi(vm, &msi), 1);
    CHECK(atomic_load(&c->requests) & REQ_EVENT);
    CHECK_EQ(take(c), -1); /* before the look */
    pv_eoi_sync(c);
    CHECK_EQ(take(c), 0x41);

    /* Not ended: the offer is taken back, and EOI is written. */
    CHECK(offered());
    msi.data = 0x42;
    CHECK_EQ(irqchip_send_msi(vm, &msi), 1);
    pv_eoi_sync(c);
    CHECK(!offered());
    CHECK_EQ(take(c), -1);
    guest_eoi();
    CHECK_EQ(take(c), 0x42);
    guest_eoi();

    /* Ended, and something higher displaces it before anybody looked: both are over in the end. */
    edge(0x50);
    CHECK_EQ(take(c), 0x50);
    guest_eoi();
    msi.data = 0x71;
    CHECK_EQ(irqchip_send_msi(vm, &msi), 1);
    CHECK_EQ(take(c), 0x71);
    CHECK_EQ(isr(0x50), 0);
    guest_eoi();
    CHECK_EQ(isr(0x71), 0);
    CHECK_EQ(isr(0x50), 0);
    /* The same while the first is still being handled: it ends with a write to EOI. */
    edge(0x50);
    CHECK_EQ(take(c), 0x50);
    CHECK_EQ(irqchip_send_msi(vm, &msi), 1);
    CHECK_EQ(take(c), 0x71);
    guest_eoi();
    guest_eoi();
    CHECK_EQ(isr(0x71), 0);
    CHECK_EQ(isr(0x50), 0);

    /* None while another waits, and none for a level. */
    edge(0x52);
    edge(0x62);
    CHECK_EQ(take(c), 0x62);
    CHECK(!offered());
    guest_eoi();
    CHECK_EQ(take(c), 0x52);
    CHECK(offered());
    guest_eoi();
    ioapic_wr(vm, 0x10 + 2 * 20, 0x8071);
    irqchip_set_line(vm, 20, 1);
    pv_eoi_sync(c);
    CHECK_EQ(take(c), 0x71);
    CHECK(!offered());
    irqchip_set_line(vm, 20, 0);
    guest_eoi();
    CHECK_EQ(ioapic_rd(vm, 0x10 + 2 * 20), 0x8071);

    /* Nested: each end ends the inner one. */
    edge(0x55);
    CHECK_EQ(take(c), 0x55);
    msi.data = 0x85;
    irqchip_send_msi(vm, &msi);
    pv_eoi_sync(c);
    CHECK_EQ(take(c), 0x85);
    CHECK(offered());
    guest_eoi();
    guest_eoi();
    CHECK_EQ(isr(0x85), 0);
    CHECK_EQ(isr(0x55), 0);

    /* The offer is part of the image. */
    edge(0x57);
    CHECK_EQ(take(c), 0x57);
    struct kvs_lapic_state a, b;
    lapic_get_state(c, &a);
    lapic_reset(c, true);
    CHECK_EQ(lapic_set_state(c, &a), 0);
    lapic_get_state(c, &b);
    CHECK(!memcmp(&a, &b, sizeof a));
    guest_eoi();
    CHECK_EQ(isr(0x57), 0);
    lapic_set_state(c, &a);
    lapic_reset(c, true); /* and INIT forgets it */
    enable(c);
    edge(0x57);
    CHECK_EQ(take(c), 0x57);

    /* Switched off in the middle, an address without memory, nothing in service. */
    CHECK_EQ(pv_eoi_enable(c, 0, false), 0);
    CHECK_EQ(isr(0x57), 1);
    apic(c, 0xb0, 0);
    CHECK_EQ(pv_eoi_enable(c, sizeof guest_memory | 1, false), -1);
    CHECK_EQ(c->msr_kvm_pv_eoi, 0);
    CHECK_EQ(pv_eoi_enable(c, sizeof guest_memory | 1, true), 0); /* the host restores anything */
    edge(0x58);
    CHECK_EQ(take(c), 0x58);
    CHECK_EQ(isr(0x58), 1);
    apic(c, 0xb0, 0);
    CHECK_EQ(isr(0x58), 0);
    scrap(vm);
}

static void test_send_ipi(void)
{
    vm = machine(3, KVS_CLOCK_VIRTUAL, 0);
    struct kvs_vcpu **v = vm->vcpus;
    for (int i = 0; i < 3; i++)
        enable(v[i]);
    CHECK_EQ(irqchip_send_ipi(vm, 5, 0, 0x45), 2);
    CHECK_EQ(take(v[0]), 0x45);
    CHECK_EQ(take(v[1]), -1);
    CHECK_EQ(take(v[2]), 0x45);
    CHECK_EQ(irqchip_send_ipi(vm, ~0ull, 1, 0x446), 2); /* NMI */
    CHECK_EQ(atomic_load(&v[0]->nmi_pending), 0);
    CHECK_EQ(atomic_load(&v[2]->nmi_pending), 1);
    CHECK_EQ(irqchip_send_ipi(vm, ~0ull, 3, 0x47), 0);
    CHECK_EQ(irqchip_send_ipi(vm, 0xffffffff, UINT32_MAX, 0x47), 3); /* IDs wrap: all within 64 of the first */
    CHECK_EQ(irqchip_send_ipi(vm, ~0ull, 0, 0x747), 0);
    CHECK_EQ(irqchip_send_ipi(vm, ~0ull, 0, 0x347), 0);
    atomic_store(&v[1]->requests, 0);
    irqchip_unhalt(vm, 1);
    CHECK(atomic_load(&v[1]->pv_unhalted) && (atomic_load(&v[1]->requests) & REQ_EVENT));
    CHECK(!atomic_load(&v[0]->pv_unhalted));
    irqchip_unhalt(vm, 77);
    scrap(vm);
}

static void test_steal_time(void)
{
    start();
    st64(guest_memory + 0x40, 12345);
    st32(guest_memory + 0x48, 7);
    guest_memory[0x50] = 1;
    c->msr_kvm_steal_time = 0x40 | 1;
    steal_time_enable(c);
    CHECK_EQ(ld64(guest_memory + 0x40), 12345); /* it goes on from what is there */
    CHECK_EQ(ld32(guest_memory + 0x48), 10);
    CHECK_EQ(guest_memory[0x50], 0);
    advance(vm, 1000000000);
    steal_time_update(c);
    CHECK_EQ(ld64(guest_memory + 0x40), 12345); /* virtual time: nothing is stolen */
    CHECK_EQ(ld32(guest_memory + 0x48), 10);
    c->msr_kvm_steal_time = 0x1000000 | 1;
    steal_time_enable(c);
    scrap(vm);
}

/* Two threads that want one processor: one's figure grows as the other runs. */
static _Atomic bool stop_spinning;
static void *spin(void *unused)
{
    while (!atomic_load(&stop_spinning)) { }
    return unused;
}
static void test_steal_is_real(void)
{
    if (!steal_time_available()) {
        printf("this host counts no run delay\n");
        return;
    }
    vm = machine(1, KVS_CLOCK_REAL, 0);
    c = vm->vcpus[0];
    memset(guest_memory, 0, sizeof guest_memory);
    uint64_t begin = clock_now(vm);
    c->msr_kvm_steal_time = 0x40 | 1;
    steal_time_enable(c);
    cpu_set_t old, one;
    CPU_ZERO(&one);
    CHECK_EQ(sched_getaffinity(0, sizeof old, &old), 0);
    int cpu = 0;
    while (!CPU_ISSET(cpu, &old))
        cpu++;
    CPU_SET(cpu, &one);
    CHECK_EQ(sched_setaffinity(0, sizeof one, &one), 0);
    pthread_t other;
    CHECK_EQ(pthread_create(&other, NULL, spin, NULL), 0);
    while (clock_now(vm) - begin < 10000000000ull && ld64(guest_memory + 0x40) < 10000000) {
        for (volatile int i = 0; i < 100000; i++) { }
        steal_time_update(c);
    }
    atomic_store(&stop_spinning, true);
    pthread_join(other, NULL);
    uint64_t steal = ld64(guest_memory + 0x40), wall = clock_now(vm) - begin;
    CHECK(steal >= 10000000);
    CHECK(steal <= wall);
    CHECK_EQ(ld32(guest_memory + 0x48) & 1, 0);
    CHECK_EQ(sched_setaffinity(0, sizeof old, &old), 0);
    steal_time_close(c);
    scrap(vm);
}

int main(void)
{
    test_pv_eoi();
    test_send_ipi();
    test_steal_time();
    test_steal_is_real();
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
