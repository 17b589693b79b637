// start[b,c,q]: where the document of position q of chunk c begins, as a position in that chunk; -1 if before
// the chunk.
//
// seq_idx [B,L], start [B,nC,Q]. A document starts wherever seq_idx differs from the position before it, so
// equal values with another document between them stay apart. The first document of a row continues what came
// before the row (-1).
// With i >= j: positions i and j share a document iff j >= start[i]; the state entering the chunk reaches i
// iff start[i] < 0. Positions past the end of the row continue its last document. One invocation walks one
// chunk.

import package::lib::index::workgroup_index;

struct Params {
  seqlen: u32,
  nchunks: u32,
  chunk_size: u32,
  total: u32, // batch * nchunks
}

@group(0) @binding(0) var<storage, read> seq_idx: array<i32>;
@group(0) @binding(1) var<storage, read_write> start: array<i32>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;

@compute @workgroup_size(WG)
fn document_start(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let id = workgroup_index(wid, nwg) * WG + lane;
  if (id >= params.total) {
    return;
  }
  let row = id / params.nchunks * params.seqlen;
  let first = id % params.nchunks * params.chunk_size;
  let length = min(params.chunk_size, params.seqlen - first);
  var begin = -1;
  var previous = seq_idx[row + max(first, 1u) - 1u]; // position 0 starts nothing: it is compared with itself
  for (var q = 0u; q < params.chunk_size; q++) {
    if (q < length) {
      let value = seq_idx[row + first + q];
      if (value != previous) {
        begin = i32(q);
      }
      previous = value;
    }
    start[id * params.chunk_size + q] = begin;
  }
}
