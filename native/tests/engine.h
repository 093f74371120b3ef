/* The engine that test programs ask for: KVS_TEST_ENGINE=jit runs them on translated code from its first execution on. */
#ifndef KVS_TEST_ENGINE_H
#define KVS_TEST_ENGINE_H

#include <stdlib.h>
#include <string.h>

static inline int test_jit(void)
{
    const char *name = getenv("KVS_TEST_ENGINE");
    return name && !strcmp(name, "jit");
}
#define TEST_ENGINE .engine = test_jit() ? KVS_ENGINE_JIT : KVS_ENGINE_INTERPRETER, .jit_threshold = 1

#endif
