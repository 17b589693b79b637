// S[b,c,h,p,n] = sum over the positions t of chunk c of weight_t v_t[p] u_t[n].
//
// v [B,L,H,P], u [B,L,G,N] (head h reads group h / (H/G)), weight [B,H,nC,Q], S [B,nC,H,P,N]; f32 sums in
// order of t. With v = x, u = B and the leaving weights this is what a chunk adds to the state; with v = dy,
// u = C and the entering weights it is the gradient of the state that entered it.
// One invocation computes a tile of 8 p by 8 n: four quads are loaded for 64 multiply-adds.
// Source: Mamba-2, arXiv 2405.21060, section 6.

import package::lib::index::workgroup_index;
import package::lib::tile::{Tile, add_outer, sums_of, next_quad, quad_indices};

struct Params {
  seqlen: u32,
  nheads: u32,
  headdim: u32,
  ngroups: u32,
  dstate: u32,
  nchunks: u32,
  chunk_size: u32,
  total: u32, // batch * nchunks * nheads * ceil(headdim / 8) * ceil(dstate / 8)
}

@if(vec4) @group(0) @binding(0) var<storage, read> v: array<vec4f>;
@else @group(0) @binding(0) var<storage, read> v: array<f32>;
@if(vec4) @group(0) @binding(1) var<storage, read> u: array<vec4f>;
@else @group(0) @binding(1) var<storage, read> u: array<f32>;
@group(0) @binding(2) var<storage, read> weight: array<f32>;
@if(vec4) @group(0) @binding(3) var<storage, read_write> states: array<vec4f>;
@else @group(0) @binding(3) var<storage, read_write> states: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;

@if(vec4) fn load_v(row: u32, p: u32) -> vec4f {
  return v[(row * params.headdim + p) / 4u];
}
@else fn load_v(row: u32, p: u32) -> vec4f {
  let at = quad_indices(row, p, params.headdim);
  return vec4f(v[at.x], v[at.y], v[at.z], v[at.w]);
}

@if(vec4) fn load_u(row: u32, n: u32) -> vec4f {
  return u[(row * params.dstate + n) / 4u];
}
@else fn load_u(row: u32, n: u32) -> vec4f {
  let at = quad_indices(row, n, params.dstate);
  return vec4f(u[at.x], u[at.y], u[at.z], u[at.w]);
}

@if(vec4) fn store(head: u32, p: u32, n: u32, value: vec4f) {
  states[((head * params.headdim + p) * params.dstate + n) / 4u] = value;
}
@else fn store(head: u32, p: u32, n: u32, value: vec4f) {
  if (p < params.headdim) {
    for (var k = 0u; k < 4u && n + k < params.dstate; k++) {
      states[(head * params.headdim + p) * params.dstate + n + k] = value[k];
    }
  }
}

@compute @workgroup_size(WG)
fn chunk_state(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  var id = workgroup_index(wid, nwg) * WG + lane;
  if (id >= params.total) {
    return;
  }
  let tiles_n = (params.dstate + 7u) / 8u;
  let tiles_p = (params.headdim + 7u) / 8u;
  let n0 = id % tiles_n * 8u;
  id /= tiles_n;
  let p0 = id % tiles_p * 8u;
  let head = id / tiles_p; // (b * nchunks + c) * nheads + h
  let h = head % params.nheads;
  let c = head / params.nheads % params.nchunks;
  let b = head / (params.nheads * params.nchunks);
  let g = h / (params.nheads / params.ngroups);
  let n1 = next_quad(n0, params.dstate);
  let p1 = next_quad(p0, params.headdim);
  let first = c * params.chunk_size;
  let length = min(params.chunk_size, params.seqlen - first);
  let weights = ((b * params.nheads + h) * params.nchunks + c) * params.chunk_size;

  var tile = Tile();
  for (var t = 0u; t < length; t++) {
    let w = weight[weights + t];
    let v_row = (b * params.seqlen + first + t) * params.nheads + h;
    let u_row = (b * params.seqlen + first + t) * params.ngroups + g;
    add_outer(&tile, w * load_v(v_row, p0), w * load_v(v_row, p1), load_u(u_row, n0), load_u(u_row, n1));
  }
  let sums = sums_of(tile);
  for (var k = 0u; k < 8u; k++) {
    let p = select(p1 + k - 4u, p0 + k, k < 4u);
    store(head, p, n0, sums[2u * k]);
    store(head, p, n1, sums[2u * k + 1u]);
  }
}
