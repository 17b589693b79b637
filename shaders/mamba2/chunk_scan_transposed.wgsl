// z_j[p] = sum_{i>j} CB_ij exp(a_i - a_j) dy_i[p] by chunks: the gradient of dt_j x_j without the diagonal.
//
// CB [B,nC,G,Q,Q], dy and z [B,L,H,P], dA_cumsum (= a) [B,H,nC,Q]; f32 sums in order of i. Pairs of different
// documents are left out (start [B,nC,Q], see document_start.wgsl).
//
// One invocation computes a tile of 8 positions j by 8 p. Behind the tile (i > jl, its last position) the
// decay is split into exp(a_i - a_jl) exp(a_jl - a_j), both with exponents <= 0: one exp per i, not one per
// pair.

import package::lib::index::workgroup_index;
import package::lib::tile::{Tile, add_outer, sums_of, next_quad, four, quad_indices};

struct Params {
  seqlen: u32,
  nheads: u32,
  headdim: u32,
  ngroups: u32,
  nchunks: u32,
  chunk_size: u32,
  total: u32, // batch * nchunks * ceil(chunk_size / 8) * nheads * ceil(headdim / 8)
}

@if(vec4) @group(0) @binding(0) var<storage, read> CB: array<vec4f>;
@else @group(0) @binding(0) var<storage, read> CB: array<f32>;
@if(vec4) @group(0) @binding(1) var<storage, read> dy: array<vec4f>;
@else @group(0) @binding(1) var<storage, read> dy: array<f32>;
@group(0) @binding(2) var<storage, read> dA_cumsum: array<f32>;
@group(0) @binding(3) var<storage, read> start: array<i32>; // read with the condition `documents` only
@if(vec4) @group(0) @binding(4) var<storage, read_write> z: array<vec4f>;
@else @group(0) @binding(4) var<storage, read_write> z: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;

@if(vec4) fn load_CB(row: u32, j: vec4u) -> vec4f {
  return CB[(row * params.chunk_size + j.x) / 4u];
}
@else fn load_CB(row: u32, j: vec4u) -> vec4f {
  let at = row * params.chunk_size + j;
  return vec4f(CB[at.x], CB[at.y], CB[at.z], CB[at.w]);
}

fn load_a(at: vec4u) -> vec4f {
  return vec4f(dA_cumsum[at.x], dA_cumsum[at.y], dA_cumsum[at.z], dA_cumsum[at.w]);
}

@if(vec4) fn load_dy(row: u32, p: u32) -> vec4f {
  return dy[(row * params.headdim + p) / 4u];
}
@else fn load_dy(row: u32, p: u32) -> vec4f {
  let at = quad_indices(row, p, params.headdim);
  return vec4f(dy[at.x], dy[at.y], dy[at.z], dy[at.w]);
}

@if(vec4) fn store(row: u32, p: u32, value: vec4f) {
  z[(row * params.headdim + p) / 4u] = value;
}
@else fn store(row: u32, p: u32, value: vec4f) {
  for (var k = 0u; k < 4u && p + k < params.headdim; k++) {
    z[row * params.headdim + p + k] = value[k];
  }
}

@compute @workgroup_size(WG)
fn chunk_scan_transposed(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  var id = workgroup_index(wid, nwg) * WG + lane;
  if (id >= params.total) {
    return;
  }
  let tiles_p = (params.headdim + 7u) / 8u;
  let tiles_t = (params.chunk_size + 7u) / 8u;
  let p0 = id % tiles_p * 8u;
  id /= tiles_p;
  let h = id % params.nheads;
  id /= params.nheads;
  let j0 = id % tiles_t * 8u;
  let c = id / tiles_t % params.nchunks;
  let b = id / (tiles_t * params.nchunks);
  let g = h / (params.nheads / params.ngroups);
  let p1 = next_quad(p0, params.headdim);
  let first = c * params.chunk_size;
  let length = min(params.chunk_size, params.seqlen - first);
  if (j0 >= length) {
    return;
  }
  let row = b * params.seqlen + first;
  let steps = ((b * params.nheads + h) * params.nchunks + c) * params.chunk_size;
  let matrix = ((b * params.nchunks + c) * params.ngroups + g) * params.chunk_size;
  let begins = (b * params.nchunks + c) * params.chunk_size;
  // What is computed for positions past the end is not stored.
  let ja = four(j0, params.chunk_size - 1u);
  let jb = four(next_quad(j0, params.chunk_size), params.chunk_size - 1u);
  let aa = load_a(steps + ja);
  let ab = load_a(steps + jb);
  let fa = exp(min(ab.w - aa, vec4f()));
  let fb = exp(min(ab.w - ab, vec4f()));

  var tile = Tile();
  for (var i = j0 + 1u; i < min(j0 + 8u, length); i++) {
    let a_i = dA_cumsum[steps + i];
    var wa = select(vec4f(), load_CB(matrix + i, ja) * exp(min(a_i - aa, vec4f())), ja < vec4u(i));
    var wb = select(vec4f(), load_CB(matrix + i, jb) * exp(min(a_i - ab, vec4f())), jb < vec4u(i));
    @if(documents) let begin = vec4i(start[begins + i]);
    @if(documents) wa = select(wa, vec4f(), vec4i(ja) < begin);
    @if(documents) wb = select(wb, vec4f(), vec4i(jb) < begin);
    let dy_row = (row + i) * params.nheads + h;
    add_outer(&tile, wa, wb, load_dy(dy_row, p0), load_dy(dy_row, p1));
  }
  for (var i = j0 + 8u; i < length; i++) {
    let kept = exp(min(dA_cumsum[steps + i] - ab.w, 0.0));
    var wa = load_CB(matrix + i, ja) * fa;
    var wb = load_CB(matrix + i, jb) * fb;
    @if(documents) let begin = vec4i(start[begins + i]);
    @if(documents) wa = select(wa, vec4f(), vec4i(ja) < begin);
    @if(documents) wb = select(wb, vec4f(), vec4i(jb) < begin);
    let dy_row = (row + i) * params.nheads + h;
    add_outer(&tile, wa, wb, kept * load_dy(dy_row, p0), kept * load_dy(dy_row, p1));
  }
  let sums = sums_of(tile);
  for (var k = 0u; k < 8u && j0 + k < length; k++) {
    store((row + j0 + k) * params.nheads + h, p0, sums[2u * k]);
    store((row + j0 + k) * params.nheads + h, p1, sums[2u * k + 1u]);
  }
}
