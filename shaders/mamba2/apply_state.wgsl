// y[b,t,h,p] = weight_t sum_n S[b,c,h,p,n] u_t[n], for the positions t of every chunk c.
//
// S [B,nC,H,P,N], u [B,L,G,N] (head h reads group h / (H/G)), weight [B,H,nC,Q] (1 without the condition `weighted`),
// y [B,L,H,P]; f32 sums in order of n. With u = C and the entering weights this is what the state that enters a chunk adds
// to its outputs; with S = dstates and u = B, unweighted, it is dS B, which the gradients of x, dt and the decay share.
// One invocation computes a tile of 8 positions by 8 p: 16 quads are loaded for 256 multiply-adds.

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

@if(vec4) fn load_state(head: u32, p: u32, n: u32) -> vec4f {
  return states[((head * params.headdim + p) * params.dstate + n) / 4u];
}
@else fn load_state(head: u32, p: u32, n: u32) -> vec4f {
  let at = quad_indices(head * params.headdim + min(p, params.headdim - 1u), n, params.dstate);
  return select(vec4f(0.0), vec4f(states[at.x], states[at.y], states[at.z], states[at.w]), below(n, params.dstate));
}

@if(vec4) fn load_u(row: u32, n: u32) -> vec4f {
  return u[(row * params.dstate + n) / 4u];
}
@else fn load_u(row: u32, n: u32) -> vec4f {
  let at = quad_indices(row, n, params.dstate);
  return select(vec4f(0.0), vec4f(u[at.x], u[at.y], u[at.z], u[at.w]), below(n, params.dstate));
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
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u, @builtin(local_invocation_index) lane: u32,
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
  let head = (b * params.nchunks + c) * params.nheads + h;
  let row = b * params.seqlen + first;
  // Rows past the end repeat the last one and are not stored.
  let ta = row + min(t0 + vec4u(0u, 1u, 2u, 3u), vec4u(length - 1u));
  let tb = row + min(t0 + vec4u(4u, 5u, 6u, 7u), vec4u(length - 1u));
  let ua = ta * params.ngroups + g;
  let ub = tb * params.ngroups + g;

  var r0 = vec4f(); var r1 = vec4f(); var r2 = vec4f(); var r3 = vec4f();
  var r4 = vec4f(); var r5 = vec4f(); var r6 = vec4f(); var r7 = vec4f();
  var s0 = vec4f(); var s1 = vec4f(); var s2 = vec4f(); var s3 = vec4f();
  var s4 = vec4f(); var s5 = vec4f(); var s6 = vec4f(); var s7 = vec4f();
  for (var n = 0u; n < params.dstate; n += 4u) {
    let S0 = mat4x4f(load_state(head, p0, n), load_state(head, p0 + 1u, n),
      load_state(head, p0 + 2u, n), load_state(head, p0 + 3u, n));
    let S1 = mat4x4f(load_state(head, p1, n), load_state(head, p1 + 1u, n),
      load_state(head, p1 + 2u, n), load_state(head, p1 + 3u, n));
    let u0 = load_u(ua.x, n); r0 += u0 * S0; s0 += u0 * S1;
    let u1 = load_u(ua.y, n); r1 += u1 * S0; s1 += u1 * S1;
    let u2 = load_u(ua.z, n); r2 += u2 * S0; s2 += u2 * S1;
    let u3 = load_u(ua.w, n); r3 += u3 * S0; s3 += u3 * S1;
    let u4 = load_u(ub.x, n); r4 += u4 * S0; s4 += u4 * S1;
    let u5 = load_u(ub.y, n); r5 += u5 * S0; s5 += u5 * S1;
    let u6 = load_u(ub.z, n); r6 += u6 * S0; s6 += u6 * S1;
    let u7 = load_u(ub.w, n); r7 += u7 * S0; s7 += u7 * S1;
  }
  let sums = array<vec4f, 16>(r0, s0, r1, s1, r2, s2, r3, s3, r4, s4, r5, s5, r6, s6, r7, s7);
  var w = 1.0;
  for (var k = 0u; k < 8u && t0 + k < length; k++) {
    @if(weighted) w = weight[((b * params.nheads + h) * params.nchunks + c) * params.chunk_size + t0 + k];
    let at = (row + t0 + k) * params.nheads + h;
    store(at, p0, w * sums[2u * k]);
    store(at, p1, w * sums[2u * k + 1u]);
  }
}
