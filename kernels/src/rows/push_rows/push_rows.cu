// Pieces of runs of rows, shared out among a fixed number of blocks. Host reference: host.rs; shapes and geometry:
// mod.rs.
#include "args.cuh"
#include "bcg.cuh"

struct Run {
    i32 source, target, rows, unused;
};

extern "C" __global__ void push_rows(PushRowsArgs a) {
    wait_for_inputs();
    release_dependents();
    i32 count = *a.count;
    if (count > a.runs_max) count = a.runs_max;
    i64 first_pieces = (a.rows_max * a.first_bytes + a.piece_bytes - 1) / a.piece_bytes;
    i64 second_pieces = (a.rows_max * a.second_bytes + a.piece_bytes - 1) / a.piece_bytes;
    i64 pieces = first_pieces + second_pieces;
    for (i64 unit = blockIdx.x; unit < count * pieces; unit += gridDim.x) {
        Run run = ((const Run*)a.runs)[unit / pieces];
        bool is_outside = run.source < 0 || run.target < 0 || run.rows > a.rows_max ||
                          run.source + (i64)run.rows > a.source_rows || run.target + (i64)run.rows > a.target_rows;
        if (is_outside) continue;
        i64 piece = unit % pieces;
        bool is_first = piece < first_pieces;
        i64 row_bytes = is_first ? a.first_bytes : a.second_bytes;
        i64 begin = (is_first ? piece : piece - first_pieces) * a.piece_bytes;
        i64 bytes = run.rows * row_bytes - begin;
        if (bytes > a.piece_bytes) bytes = a.piece_bytes;
        if (bytes <= 0) continue;
        const u8* source = (is_first ? a.first_source : a.second_source) + run.source * row_bytes + begin;
        u8* target = (is_first ? a.first_target : a.second_target) + run.target * row_bytes + begin;
        copy_row(target, source, bytes);
    }
}
