// prev[0] = initial, prev[c+1] = share_c prev[c] + states[c], share_c = exp(a_last) of chunk c; prev[nC] is
// the final state.
//
// states and prev [B,nC,H,P,N], initial and final [B,H,P,N], dA_cumsum (= a) [B,H,nC,Q]. A chunk in which a
// document starts lets nothing through (start [B,nC,Q], see document_start.wgsl). f32 throughout: a state is
// never stored in less.
// One invocation carries one element (a quad with `vec4`) through all chunks.

import package::lib::index::workgroup_index;

struct Params {
  nheads: u32,
  cells: u32, // elements (quads with `vec4`) of one head's state
  nchunks: u32,
  chunk_size: u32,
  total: u32, // batch * nheads * cells
}

@if(vec4) alias Cell = vec4f;
@else alias Cell = f32;

@group(0) @binding(0) var<storage, read> states: array<Cell>;
@group(0) @binding(1) var<storage, read> dA_cumsum: array<f32>;
@group(0) @binding(2) var<storage, read> initial_state: array<Cell>; // read with the condition `initial` only
@group(0) @binding(3) var<storage, read> start: array<i32>; // read with the condition `documents` only
@group(0) @binding(4) var<storage, read_write> prev_states: array<Cell>;
@group(0) @binding(5) var<storage, read_write> final_state: array<Cell>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;

@compute @workgroup_size(WG)
fn state_passing(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let id = workgroup_index(wid, nwg) * WG + lane;
  if (id >= params.total) {
    return;
  }
  let head = id / params.cells; // b * nheads + h
  let b = head / params.nheads;
  var state = Cell();
  @if(initial) state = initial_state[id];
  for (var c = 0u; c < params.nchunks; c++) {
    let row = (b * params.nchunks + c) * params.nheads + head % params.nheads;
    let at = row * params.cells + id % params.cells;
    prev_states[at] = state;
    let last = (head * params.nchunks + c + 1u) * params.chunk_size - 1u;
    var share = exp(min(dA_cumsum[last], 0.0));
    @if(documents) let end = (b * params.nchunks + c + 1u) * params.chunk_size;
    @if(documents) share = select(0.0, share, start[end - 1u] < 0);
    state = share * state + states[at];
  }
  final_state[id] = state;
}
