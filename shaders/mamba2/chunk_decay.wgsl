// How much of a state reaches a position, and how much of a position reaches a state:
//   entering: weight_q = exp(a_q)                      of the state that enters the chunk;
//   leaving:  decay_q = exp(a_last - a_q),  weight_q = decay_q dt_q    of position q, at the chunk's end.
//
// dt, dA_cumsum (= a), decay and weight are [B,H,nC,Q]; weights are 0 past the end of the row and across a
// document start (start [B,nC,Q], see document_start.wgsl). Exponents are <= 0, as a never increases; masks
// come after exp.
// One invocation computes one position.

import package::lib::index::workgroup_index;

struct Params {
  seqlen: u32,
  nheads: u32,
  nchunks: u32,
  chunk_size: u32,
  total: u32, // batch * nheads * nchunks * chunk_size
}

@group(0) @binding(0) var<storage, read> dt: array<f32>;
@group(0) @binding(1) var<storage, read> dA_cumsum: array<f32>;
@group(0) @binding(2) var<storage, read> start: array<i32>; // read with the condition `documents` only
@group(0) @binding(3) var<storage, read_write> weight: array<f32>;
@group(0) @binding(4) var<storage, read_write> decay: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;

// Index of position 0 of the chunk in `start`, for an element of [B,H,nC,Q].
fn start_row(id: u32) -> u32 {
  let c = id / params.chunk_size % params.nchunks;
  return (id / (params.chunk_size * params.nchunks * params.nheads) * params.nchunks + c) * params.chunk_size;
}

fn in_sequence(id: u32) -> bool {
  return id % (params.chunk_size * params.nchunks) < params.seqlen;
}

@compute @workgroup_size(WG)
fn entering(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let id = workgroup_index(wid, nwg) * WG + lane;
  if (id >= params.total) {
    return;
  }
  var reaches = in_sequence(id);
  @if(documents) reaches = reaches && start[start_row(id) + id % params.chunk_size] < 0;
  weight[id] = select(0.0, exp(min(dA_cumsum[id], 0.0)), reaches);
}

@compute @workgroup_size(WG)
fn leaving(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let id = workgroup_index(wid, nwg) * WG + lane;
  if (id >= params.total) {
    return;
  }
  let q = id % params.chunk_size;
  let last = params.chunk_size - 1u;
  var reaches = in_sequence(id);
  @if(documents) reaches = reaches && i32(q) >= start[start_row(id) + last];
  let kept = select(0.0, exp(min(dA_cumsum[id - q + last] - dA_cumsum[id], 0.0)), reaches);
  decay[id] = kept;
  weight[id] = kept * dt[id];
}
