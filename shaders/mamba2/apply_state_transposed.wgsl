// u[b,t,g,n] = sum over the heads h of group g of weight_t sum_p v_t[h,p] S[b,c,h,p,n], for the positions t
// of every chunk c.
//
// v [B,L,H,P], S [B,nC,H,P,N], weight [B,H,nC,Q], u [B,L,G,N]; f32 sums in order of h, then p. With v = x,
// S = dstates and the leaving weights this is dB; with v = dy, S = prev_states and the entering weights, the
// state's part of dC.
// One invocation computes a tile of 8 positions by 8 n: 16 quads are loaded for 256 multiply-adds.

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
  total: u32, // batch * nchunks * ceil(chunk_size / 8) * ngroups * ceil(dstate / 8)
}

@if(vec4) @group(0) @binding(0) var<storage, read> states: array<vec4f>;
@else @group(0) @binding(0) var<storage, read> states: array<f32>;
@if(vec4) @group(0) @binding(1) var<storage, read> v: array<vec4f>;
@else @group(0) @binding(1) var<storage, read> v: array<f32>;
@group(0) @binding(2) var<storage, read> weight: array<f32>;
@if(vec4) @group(0) @binding(3) var<storage, read_write> u: array<vec4f>;
@else @group(0) @binding(3) var<storage, read_write> u: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;

@if(vec4) fn load_state(row: u32, n: u32) -> vec4f {
  return states[(row * params.dstate + n) / 4u];
}
@else fn load_state(row: u32, n: u32) -> vec4f {
  let at = quad_indices(row, n, params.dstate);
  return vec4f(states[at.x], states[at.y], states[at.z], states[at.w]);
}

// Zero past headdim, where the state's last row is repeated.
@if(vec4) fn load_v(row: u32, p: u32) -> vec4f {
  return v[(row * params.headdim + p) / 4u];
}
@else fn load_v(row: u32, p: u32) -> vec4f {
  let at = quad_indices(row, p, params.headdim);
  return select(vec4f(), vec4f(v[at.x], v[at.y], v[at.z], v[at.w]), below(p, params.headdim));
}

// Four rows p of the state, at columns n, ..., n + 3, as four rows n.
fn state_columns(rows: vec4u, n: u32) -> mat4x4f {
  return transpose(mat4x4f(
    load_state(rows.x, n), load_state(rows.y, n), load_state(rows.z, n), load_state(rows.w, n)));
}

fn v_rows(rows: vec4u, p: u32, weight: vec4f) -> mat4x4f {
  return mat4x4f(weight.x * load_v(rows.x, p), weight.y * load_v(rows.y, p),
    weight.z * load_v(rows.z, p), weight.w * load_v(rows.w, p));
}

@if(vec4) fn store(row: u32, n: u32, value: vec4f) {
  u[(row * params.dstate + n) / 4u] = value;
}
@else fn store(row: u32, n: u32, value: vec4f) {
  for (var k = 0u; k < 4u && n + k < params.dstate; k++) {
    u[row * params.dstate + n + k] = value[k];
  }
}

@compute @workgroup_size(WG)
fn apply_state_transposed(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  var id = workgroup_index(wid, nwg) * WG + lane;
  if (id >= params.total) {
    return;
  }
  let tiles_n = (params.dstate + 7u) / 8u;
  let tiles_t = (params.chunk_size + 7u) / 8u;
  let n0 = id % tiles_n * 8u;
  id /= tiles_n;
  let g = id % params.ngroups;
  id /= params.ngroups;
  let t0 = id % tiles_t * 8u;
  let c = id / tiles_t % params.nchunks;
  let b = id / (tiles_t * params.nchunks);
  let heads = params.nheads / params.ngroups;
  let n1 = next_quad(n0, params.dstate);
  let first = c * params.chunk_size;
  let length = min(params.chunk_size, params.seqlen - first);
  if (t0 >= length) {
    return;
  }
  let row = b * params.seqlen + first;
  // Rows past the end repeat the last one and are not stored.
  let ta = four(t0, length - 1u);
  let tb = four(t0 + 4u, length - 1u);

  var tile = Tile();
  for (var h = g * heads; h < (g + 1u) * heads; h++) {
    let head = ((b * params.nchunks + c) * params.nheads + h) * params.headdim;
    let at = ((b * params.nheads + h) * params.nchunks + c) * params.chunk_size;
    let wa = vec4f(weight[at + ta.x], weight[at + ta.y], weight[at + ta.z], weight[at + ta.w]);
    let wb = vec4f(weight[at + tb.x], weight[at + tb.y], weight[at + tb.z], weight[at + tb.w]);
    let va = (row + ta) * params.nheads + h;
    let vb = (row + tb) * params.nheads + h;
    for (var p = 0u; p < params.headdim; p += 4u) {
      let rows = head + four(p, params.headdim - 1u);
      add_dots(&tile, v_rows(va, p, wa), v_rows(vb, p, wb), state_columns(rows, n0), state_columns(rows, n1));
    }
  }
  let sums = sums_of(tile);
  for (var k = 0u; k < 8u && t0 + k < length; k++) {
    let at = (row + t0 + k) * params.ngroups + g;
    store(at, n0, sums[2u * k]);
    store(at, n1, sums[2u * k + 1u]);
  }
}
