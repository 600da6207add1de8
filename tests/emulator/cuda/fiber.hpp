// Fibers: one stack for each thread of a block, and the switch between two of them.

#pragma once
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

#include <vector>

// The C library's contexts elsewhere; they are slower, and can be asked for.
#if defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)
#define EMULATOR_SWITCH 1
#else
#include <ucontext.h>
#endif

namespace emulator {

#if defined(EMULATOR_SWITCH)

// A suspended fiber is its stack pointer: the registers that a call preserves lie on its stack.
struct Context {
    void* stack_pointer;
};

asm(R"(
.text
.type emulator_switch, @function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq (%rsi), %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulator_switch, . - emulator_switch
)");
extern "C" void emulator_switch(Context* from, const Context* to);

inline void switch_context(Context* from, const Context* to) { emulator_switch(from, to); }

// `entry` must not return.
inline void make_context(Context* context, uint8_t* stack, size_t size, void (*entry)()) {
    // NOTE: at the entry of a function the stack pointer is 8 below a multiple of 16.
    void** top = reinterpret_cast<void**>(stack + size) - 1;
    *top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    context->stack_pointer = top;
}

#else

struct Context {
    ucontext_t context;
};

inline void switch_context(Context* from, const Context* to) {
    swapcontext(&from->context, &to->context);
}

inline void make_context(Context* context, uint8_t* stack, size_t size, void (*entry)()) {
    getcontext(&context->context);
    context->context.uc_stack.ss_sp = stack;
    context->context.uc_stack.ss_size = size;
    context->context.uc_link = nullptr;
    makecontext(&context->context, entry, 0);
}

#endif

// Stacks, each behind a page that no access survives. They are kept for the next block.
class Stacks {
public:
    static constexpr size_t SIZE = 256 * 1024;

    ~Stacks() {
        for (uint8_t* stack : stacks) munmap(stack - guard(), SIZE + guard());
    }

    // Null where there is no memory.
    uint8_t* get(size_t i) {
        while (stacks.size() <= i) {
            void* memory = mmap(nullptr, SIZE + guard(), PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (memory == MAP_FAILED) return nullptr;
            mprotect(memory, guard(), PROT_NONE);
            stacks.push_back(static_cast<uint8_t*>(memory) + guard());
        }
        return stacks[i];
    }

private:
    static size_t guard() { return size_t(sysconf(_SC_PAGESIZE)); }
    std::vector<uint8_t*> stacks;
};

}  // namespace emulator
