// u[b,t,g,n] = sum over the heads h of group g of weight_t sum_p v_t[h,p] S[b,c,h,p,n], for the positions t of every chunk.
//
// v [B,L,H,P], S [B,nC,H,P,N], weight [B,H,nC,Q], u [B,L,G,N]; f32 sums in order of h, then p. With v = x, S = dstates and
// the leaving weights this is dB; with v = dy, S = prev_states and the entering weights, the state's part of dC.
// One invocation computes a tile of 8 positions by 8 n: 16 quads are loaded for 256 multiply-adds.

import package::lib::index::workgroup_index;
import package::lib::tile::{next_quad, below, quad_indices};

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

@if(vec4) fn load_state(head: u32, p: u32, n: u32) -> vec4f {
  return states[((head * params.headdim + p) * params.dstate + n) / 4u];
}
@else fn load_state(head: u32, p: u32, n: u32) -> vec4f {
  let at = quad_indices(head * params.headdim + min(p, params.headdim - 1u), n, params.dstate);
  return vec4f(states[at.x], states[at.y], states[at.z], states[at.w]);
}

// Zero past headdim, where load_state repeats the last row.
@if(vec4) fn load_v(row: u32, p: u32) -> vec4f {
  return v[(row * params.headdim + p) / 4u];
}
@else fn load_v(row: u32, p: u32) -> vec4f {
  let at = quad_indices(row, p, params.headdim);
  return select(vec4f(0.0), vec4f(v[at.x], v[at.y], v[at.z], v[at.w]), below(p, params.headdim));
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
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u, @builtin(local_invocation_index) lane: u32,
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
  // Rows past the end repeat the last one and are not stored.
  let qa = min(t0 + vec4u(0u, 1u, 2u, 3u), vec4u(length - 1u));
  let qb = min(t0 + vec4u(4u, 5u, 6u, 7u), vec4u(length - 1u));
  let ta = b * params.seqlen + first + qa;
  let tb = b * params.seqlen + first + qb;

  var r0 = vec4f(); var r1 = vec4f(); var r2 = vec4f(); var r3 = vec4f();
  var r4 = vec4f(); var r5 = vec4f(); var r6 = vec4f(); var r7 = vec4f();
  var s0 = vec4f(); var s1 = vec4f(); var s2 = vec4f(); var s3 = vec4f();
  var s4 = vec4f(); var s5 = vec4f(); var s6 = vec4f(); var s7 = vec4f();
  for (var h = g * heads; h < (g + 1u) * heads; h++) {
    let head = (b * params.nchunks + c) * params.nheads + h;
    let at = ((b * params.nheads + h) * params.nchunks + c) * params.chunk_size;
    let wa = vec4f(weight[at + qa.x], weight[at + qa.y], weight[at + qa.z], weight[at + qa.w]);
    let wb = vec4f(weight[at + qb.x], weight[at + qb.y], weight[at + qb.z], weight[at + qb.w]);
    let va = ta * params.nheads + h;
    let vb = tb * params.nheads + h;
    for (var p = 0u; p < params.headdim; p += 4u) {
      let S0 = mat4x4f(load_state(head, p, n0), load_state(head, p + 1u, n0),
        load_state(head, p + 2u, n0), load_state(head, p + 3u, n0));
      let S1 = mat4x4f(load_state(head, p, n1), load_state(head, p + 1u, n1),
        load_state(head, p + 2u, n1), load_state(head, p + 3u, n1));
      let v0 = wa.x * load_v(va.x, p); r0 += S0 * v0; s0 += S1 * v0;
      let v1 = wa.y * load_v(va.y, p); r1 += S0 * v1; s1 += S1 * v1;
      let v2 = wa.z * load_v(va.z, p); r2 += S0 * v2; s2 += S1 * v2;
      let v3 = wa.w * load_v(va.w, p); r3 += S0 * v3; s3 += S1 * v3;
      let v4 = wb.x * load_v(vb.x, p); r4 += S0 * v4; s4 += S1 * v4;
      let v5 = wb.y * load_v(vb.y, p); r5 += S0 * v5; s5 += S1 * v5;
      let v6 = wb.z * load_v(vb.z, p); r6 += S0 * v6; s6 += S1 * v6;
      let v7 = wb.w * load_v(vb.w, p); r7 += S0 * v7; s7 += S1 * v7;
    }
  }
  let sums = array<vec4f, 16>(r0, s0, r1, s1, r2, s2, r3, s3, r4, s4, r5, s5, r6, s6, r7, s7);
  for (var k = 0u; k < 8u && t0 + k < length; k++) {
    let at = (b * params.seqlen + first + t0 + k) * params.ngroups + g;
    store(at, n0, sums[2u * k]);
    store(at, n1, sums[2u * k + 1u]);
  }
}
