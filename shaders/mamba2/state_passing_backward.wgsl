// Gradients of state_passing. From the last chunk to the first, with dS = dfinal at the end:
//   dstates[c] = dS;   da_last[c] = share_c <dS, prev[c]>;   dS <- share_c dS + dprev[c];   dinitial = dS
//   after chunk 0.
//
// Shapes and share_c as in state_passing.wgsl; dcumsum [B,H,nC,Q] is zero but at the last position of a
// chunk.
// `states`: one invocation carries one element (a quad with `vec4`) back through all chunks. `exponents`: one
// workgroup sums <dS, prev> over the P * N elements of one chunk of one head.

import package::lib::index::workgroup_index;
import package::lib::reduce::workgroup_sum;

struct Params {
  nheads: u32,
  cells: u32, // elements (quads with `vec4`) of one head's state
  nchunks: u32,
  chunk_size: u32,
  total: u32, // states: batch * nheads * cells; exponents: batch * nheads * nchunks
}

@if(vec4) alias Cell = vec4f;
@else alias Cell = f32;

@group(0) @binding(0) var<storage, read> dprev: array<Cell>;
@group(0) @binding(1) var<storage, read> dfinal: array<Cell>;
@group(0) @binding(2) var<storage, read> dA_cumsum: array<f32>;
@group(0) @binding(3) var<storage, read> start: array<i32>; // read with the condition `documents` only
@group(0) @binding(4) var<storage, read> prev_states: array<Cell>;
@group(0) @binding(5) var<storage, read_write> dstates: array<Cell>;
@group(0) @binding(6) var<storage, read_write> dinitial: array<Cell>;
@group(0) @binding(7) var<storage, read_write> dcumsum: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;

// The share of the state that chunk c lets through; head = b * nheads + h.
fn share(head: u32, c: u32) -> f32 {
  let kept = exp(min(dA_cumsum[(head * params.nchunks + c + 1u) * params.chunk_size - 1u], 0.0));
  @if(documents) {
    let last = (head / params.nheads * params.nchunks + c + 1u) * params.chunk_size - 1u;
    return select(0.0, kept, start[last] < 0);
  }
  @else {
    return kept;
  }
}

fn cell(head: u32, c: u32, i: u32) -> u32 {
  let row = (head / params.nheads * params.nchunks + c) * params.nheads + head % params.nheads;
  return row * params.cells + i;
}

@if(vec4) fn sum_of(product: vec4f) -> f32 {
  return product.x + product.y + product.z + product.w;
}
@else fn sum_of(product: f32) -> f32 {
  return product;
}

@compute @workgroup_size(WG)
fn states(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let id = workgroup_index(wid, nwg) * WG + lane;
  if (id >= params.total) {
    return;
  }
  let head = id / params.cells;
  var d = dfinal[id];
  for (var c = params.nchunks; c > 0u; c--) {
    let at = cell(head, c - 1u, id % params.cells);
    dstates[at] = d;
    d = share(head, c - 1u) * d + dprev[at];
  }
  dinitial[id] = d;
}

@compute @workgroup_size(WG)
fn exponents(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let id = workgroup_index(wid, nwg); // head * nchunks + c
  if (id >= params.total) {
    return;
  }
  let head = id / params.nchunks;
  let c = id % params.nchunks;
  var product = 0.0;
  for (var i = lane; i < params.cells; i += WG) {
    let at = cell(head, c, i);
    product += sum_of(dstates[at] * prev_states[at]);
  }
  let sum = share(head, c) * workgroup_sum(product, lane);
  for (var q = lane; q < params.chunk_size; q += WG) {
    dcumsum[id * params.chunk_size + q] = select(0.0, sum, q == params.chunk_size - 1u);
  }
}
