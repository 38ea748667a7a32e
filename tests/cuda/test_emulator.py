"""The emulator reports the mistakes that it is there for."""

import ctypes
from pathlib import Path

import pytest
from emulation import EmulatedKernel, compiled, needs_compiler

SOURCE = """
typedef unsigned int u32;
struct Projection { const char* weight; int outputs; };
struct Arguments { Projection projections[1]; int count, which; float* result; const char* memory; };
struct Shared { float words[64]; uint4 slots[64]; Mailbox mailbox; };
extern "C" __global__ void faulty(const __grid_constant__ Arguments arguments) {
    extern __shared__ uint4 dynamic_shared[];
    Shared& shared = *(Shared*)dynamic_shared;
    const int thread = threadIdx.x, rank = blockIdx.x % 2, which = arguments.which;
    if (which == 0 || which >= 14) {
        const bool opens = rank == 0 && thread == 0;
        if (opens && which != 14) shared.mailbox.open(which == 15 ? 260 : which == 16 ? 252 : 256);
        cluster_arrive();
        if (opens && which == 17) shared.mailbox.open(256);
        shared.slots[thread] = make_uint4(1, 2, 3, 4);
        __syncthreads();
        cluster_wait();
        const float word = __shfl_xor_sync(0xffffffffu, (float)(rank * 64 + thread), 1);
        if (rank) return shared.mailbox.send(shared.words + thread, word);
        if (which == 18) arguments.result[thread] = shared.words[thread];
        shared.mailbox.await();
        if (which != 18) arguments.result[thread] = shared.words[thread];
    }
    if (which == 1 && thread != 5) __syncthreads();
    if (which == 2 && thread % 32 < 16) __shfl_sync(0xffffffffu, thread, 0);
    if (which == 3) shared.words[64 + 256 + 4 + thread] = 0;
    if (which == 4) {
        shared.words[thread] = 1;
        arguments.result[rank * 64 + thread] = shared.words[63 - thread];
    }
    if (which == 5 || which == 6) {
        if (rank == 0 && thread == 0) shared.mailbox.open(256);
        if (which == 5) cluster_arrive(), cluster_wait();
        if (rank) shared.mailbox.send(shared.words + thread, 1.f);
    }
    if (which == 7) cluster_arrive();
    if (which == 8 && rank) { cluster_arrive(); cluster_wait(); }
    if (which == 9) start_copy(shared.slots + thread, arguments.memory), end_group();
    if (which == 10) start_copy(shared.slots + 65, arguments.memory);
    if (which == 11) start_copy(shared.slots, arguments.memory + 16);
    if (which == 12) {
        start_copy(shared.slots + thread, arguments.memory);
        end_group();
        await_groups<1>();
        arguments.result[rank * 64 + thread] = __uint_as_float(shared.slots[thread].x);
        await_groups<0>();
    }
    if (which == 13) shared.words[-1] = 0;
}
"""


class Projection(ctypes.Structure):
    _fields_ = (("weight", ctypes.c_void_p), ("outputs", ctypes.c_int))


class Arguments(ctypes.Structure):
    _fields_ = (
        ("projections", Projection * 1), ("count", ctypes.c_int), ("which", ctypes.c_int),
        ("result", ctypes.c_void_p), ("memory", ctypes.c_void_p),
    )  # fmt: skip


def run(folder: Path, which: int) -> list[float]:
    macros = {"BF16": False, "THREADS": 64, "CLUSTER": 2, "CHANNELS": 1, "INPUT": 0}
    kernel = EmulatedKernel(compiled(folder, SOURCE, "faulty", macros), 256 + 1024 + 16, 64)
    result, memory = (ctypes.c_float * 128)(), (ctypes.c_char * 64)()
    place = (ctypes.addressof(memory) + 15) // 16 * 16
    weight = Projection(place, 8)
    arguments = Arguments((Projection * 1)(weight), 1, which, ctypes.addressof(result), place)
    kernel.prepared(2, 64, arguments, cluster=2).start()
    return list(result)


@needs_compiler
def test_messages_in_a_cluster(library_folder: Path) -> None:
    assert run(library_folder, 0) == [*((64 + i) ^ 1 for i in range(64)), *[0] * 64]  # the first block's, and nobody's


@needs_compiler
@pytest.mark.parametrize(
    ("which", "message"),
    [
        pytest.param(1, "deadlock .* 126 threads wait at __syncthreads, .* 2 have exited", id="barrier"),
        pytest.param(2, "deadlock .* 64 at a shuffle", id="shuffle"),
        pytest.param(3, "beyond its shared memory", id="beyond-shared-memory"),
        pytest.param(13, "below its shared memory", id="below-shared-memory"),
        pytest.param(5, "to a block that has exited", id="message-to-an-exited-block"),
        pytest.param(6, "to a block that may not have started", id="message-before-the-barrier"),
        pytest.param(7, "never waits there", id="arrival-without-waiting"),
        pytest.param(8, "deadlock .* 64 at the cluster's barrier, 0 for mail; 64 have exited", id="cluster-barrier"),
        pytest.param(14, "a mailbox that is not open", id="mailbox-not-opened"),
        pytest.param(15, "deadlock .* 64 for mail; 64 have exited", id="message-missing"),
        pytest.param(16, "that the mailbox does not expect", id="message-unexpected"),
        pytest.param(17, "a mailbox is opened too late", id="mailbox-opened-late"),
        pytest.param(9, "exits before its copies have arrived", id="copy-not-awaited"),
        pytest.param(10, "out of shared memory", id="copy-beyond-shared-memory"),
        pytest.param(11, "memory that is not a weight's", id="copy-from-elsewhere"),
    ],
)
def test_mistakes(which: int, message: str, library_folder: Path) -> None:
    with pytest.raises(AssertionError, match=message):
        run(library_folder, which)


@needs_compiler
@pytest.mark.parametrize(
    "which",
    [
        pytest.param(4, id="shared-memory"),
        pytest.param(12, id="copy-under-way"),
        pytest.param(18, id="message-under-way"),
    ],
)
def test_what_is_not_there_yet_is_nan(which: int, library_folder: Path) -> None:
    assert any(value != value for value in run(library_folder, which))
