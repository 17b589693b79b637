// y[b,t,h,p] = weight_t sum_n S[b,c,h,p,n] u_t[n], for the positions t of every chunk c.
//
// S [B,nC,H,P,N], u [B,L,G,N] (head h reads group h / (H/G)), weight [B,H,nC,Q] (1 without the condition
// `weighted`), y [B,L,H,P]; f32 sums in order of n. With u = C and the entering weights this is what the
// state that enters a chunk adds to its outputs; with S = dstates and u = B, unweighted, it is dS B, which
// the gradients of x, dt and the decay share.
// One invocation computes a tile of 8 positions by 8 p: 16 quads are loaded for 256 multiply-adds.

import package::lib::index::workgroup_index;
import package::lib::tile::{Tile, add_dots, sums_of, next_quad, four, below, quad_indices};

struct Params {
  seqlen: u32,
  nheads: u32,
  headdim: u32,
  ngroups: u32,
  dstate: u32,
  nchunks: u32,
  chunk_size: u32,
  total: u32, // batch * nchunks * ceil(chunk_size / 8) * nheads * ceil(headdim / 8)
}

@if(vec4) @group(0) @binding(0) var<storage, read> states: array<vec4f>;
@else @group(0) @binding(0) var<storage, read> states: array<f32>;
@if(vec4) @group(0) @binding(1) var<storage, read> u: array<vec4f>;
@else @group(0) @binding(1) var<storage, read> u: array<f32>;
@group(0) @binding(2) var<storage, read> weight: array<f32>; // read with the condition `weighted` only
@if(vec4) @group(0) @binding(3) var<storage, read_write> y: array<vec4f>;
@else @group(0) @binding(3) var<storage, read_write> y: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;

@if(vec4) fn load_state(row: u32, n: u32) -> vec4f {
  return states[(row * params.dstate + n) / 4u];
}
@else fn load_state(row: u32, n: u32) -> vec4f {
  let at = quad_indices(row, n, params.dstate);
  let quad = vec4f(states[at.x], states[at.y], states[at.z], states[at.w]);
  return select(vec4f(), quad, below(n, params.dstate));
}

@if(vec4) fn load_u(row: u32, n: u32) -> vec4f {
  return u[(row * params.dstate + n) / 4u];
}
@else fn load_u(row: u32, n: u32) -> vec4f {
  let at = quad_indices(row, n, params.dstate);
  return select(vec4f(), vec4f(u[at.x], u[at.y], u[at.z], u[at.w]), below(n, params.dstate));
}

fn state_rows(rows: vec4u, n: u32) -> mat4x4f {
  return mat4x4f(load_state(rows.x, n), load_state(rows.y, n), load_state(rows.z, n), load_state(rows.w, n));
}

fn u_rows(rows: vec4u, n: u32) -> mat4x4f {
  return mat4x4f(load_u(rows.x, n), load_u(rows.y, n), load_u(rows.z, n), load_u(rows.w, n));
}

@if(vec4) fn store(row: u32, p: u32, value: vec4f) {
  y[(row * params.headdim + p) / 4u] = value;
}
@else fn store(row: u32, p: u32, value: vec4f) {
  for (var k = 0u; k < 4u && p + k < params.headdim; k++) {
    y[row * params.headdim + p + k] = value[k];
  }
}

@compute @workgroup_size(WG)
fn apply_state(
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
  let t0 = id % tiles_t * 8u;
  let c = id / tiles_t % params.nchunks;
  let b = id / (tiles_t * params.nchunks);
  let g = h / (params.nheads / params.ngroups);
  let p1 = next_quad(p0, params.headdim);
  let first = c * params.chunk_size;
  let length = min(params.chunk_size, params.seqlen - first);
  if (t0 >= length) {
    return;
  }
  // Rows past the end repeat the last one: p of the head, and positions, which are not stored.
  let head = ((b * params.nchunks + c) * params.nheads + h) * params.headdim;
  let pa = head + four(p0, params.headdim - 1u);
  let pb = head + four(p1, params.headdim - 1u);
  let row = b * params.seqlen + first;
  let ua = (row + four(t0, length - 1u)) * params.ngroups + g;
  let ub = (row + four(t0 + 4u, length - 1u)) * params.ngroups + g;

  var tile = Tile();
  for (var n = 0u; n < params.dstate; n += 4u) {
    add_dots(&tile, u_rows(ua, n), u_rows(ub, n), state_rows(pa, n), state_rows(pb, n));
  }
  let sums = sums_of(tile);
  var w = 1.0;
  for (var k = 0u; k < 8u && t0 + k < length; k++) {
    @if(weighted) w = weight[((b * params.nheads + h) * params.nchunks + c) * params.chunk_size + t0 + k];
    let at = (row + t0 + k) * params.nheads + h;
    store(at, p0, w * sums[2u * k]);
    store(at, p1, w * sums[2u * k + 1u]);
  }
}
