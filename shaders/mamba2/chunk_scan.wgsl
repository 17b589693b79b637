// y_i[p] = off_i[p] + CB_ii dt_i x_i[p] + D x_i[p],  off_i = (what off holds on entry) + sum_{j<i} CB_ij exp(a_i - a_j) dt_j x_j.
//
// CB [B,nC,G,Q,Q], x, off and y [B,L,H,P], dt and dA_cumsum (= a) [B,H,nC,Q], D [H]; f32 sums in order of j. On entry `off`
// is the entering state's part, exp(a_i) (prev_state C_i) (apply_state.wgsl); on exit it is all of y that depends on a,
// which the backward pass wants. Pairs of different documents are left out (start [B,nC,Q], see document_start.wgsl).
// Source: Mamba-2, arXiv 2405.21060, section 6.
//
// One invocation computes a tile of 8 positions i by 8 p in registers. Before the tile (j < i0) the decay is split into
// exp(a_i - a_i0) exp(a_i0 - a_j): one exp per j, not one per pair. Both exponents are <= 0, as a never increases, so the
// split neither overflows nor loses what the product would keep; exp(a_i) exp(-a_j) would do both. Masks come after exp.

import package::lib::index::workgroup_index;
import package::lib::tile::{next_quad, below, quad_indices};

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
@if(vec4) @group(0) @binding(1) var<storage, read> x: array<vec4f>;
@else @group(0) @binding(1) var<storage, read> x: array<f32>;
@if(vec4) @group(0) @binding(2) var<storage, read> dt: array<vec4f>;
@else @group(0) @binding(2) var<storage, read> dt: array<f32>;
@if(vec4) @group(0) @binding(3) var<storage, read> dA_cumsum: array<vec4f>;
@else @group(0) @binding(3) var<storage, read> dA_cumsum: array<f32>;
@group(0) @binding(4) var<storage, read> D: array<f32>;
@group(0) @binding(5) var<storage, read> start: array<i32>; // read with the condition `documents` only
@if(vec4) @group(0) @binding(6) var<storage, read_write> off: array<vec4f>;
@else @group(0) @binding(6) var<storage, read_write> off: array<f32>;
@if(vec4) @group(0) @binding(7) var<storage, read_write> y: array<vec4f>;
@else @group(0) @binding(7) var<storage, read_write> y: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;

@if(vec4) fn load_CB(row: u32, j: u32) -> vec4f {
  return CB[(row * params.chunk_size + j) / 4u];
}
@else fn load_CB(row: u32, j: u32) -> vec4f {
  let at = quad_indices(row, j, params.chunk_size);
  return vec4f(CB[at.x], CB[at.y], CB[at.z], CB[at.w]);
}

@if(vec4) fn load_x(row: u32, p: u32) -> vec4f {
  return x[(row * params.headdim + p) / 4u];
}
@else fn load_x(row: u32, p: u32) -> vec4f {
  let at = quad_indices(row, p, params.headdim);
  return vec4f(x[at.x], x[at.y], x[at.z], x[at.w]);
}

@if(vec4) fn load_dt(chunk: u32, q: u32) -> vec4f {
  return dt[(chunk * params.chunk_size + q) / 4u];
}
@else fn load_dt(chunk: u32, q: u32) -> vec4f {
  let at = quad_indices(chunk, q, params.chunk_size);
  return vec4f(dt[at.x], dt[at.y], dt[at.z], dt[at.w]);
}

@if(vec4) fn load_a(chunk: u32, q: u32) -> vec4f {
  return dA_cumsum[(chunk * params.chunk_size + q) / 4u];
}
@else fn load_a(chunk: u32, q: u32) -> vec4f {
  let at = quad_indices(chunk, q, params.chunk_size);
  return vec4f(dA_cumsum[at.x], dA_cumsum[at.y], dA_cumsum[at.z], dA_cumsum[at.w]);
}

@if(vec4) fn store(row: u32, p: u32, sum: vec4f, self_weight: f32) {
  let at = (row * params.headdim + p) / 4u;
  let value = off[at] + sum;
  off[at] = value;
  y[at] = value + self_weight * x[at];
}
@else fn store(row: u32, p: u32, sum: vec4f, self_weight: f32) {
  for (var k = 0u; k < 4u && p + k < params.headdim; k++) {
    let at = row * params.headdim + p + k;
    let value = off[at] + sum[k];
    off[at] = value;
    y[at] = value + self_weight * x[at];
  }
}

// Weights of x_j, ..., x_{j+3} in off_i, without dt: CB_ij exp(a_i - a_j) for j < i, where a_j is a quad. Before the tile
// exp(a_i0 - a_j) is in x already, and `factor` is exp(a_i - a_i0).
fn weights(cb: vec4f, i: u32, j: u32, a_i: f32, a_j: vec4f, factor: f32, before: bool, begin: i32) -> vec4f {
  var w = cb * factor;
  if (!before) {
    w = select(vec4f(0.0), cb * exp(min(a_i - a_j, vec4f(0.0))), below(j, i));
  }
  @if(documents) w = select(w, vec4f(0.0), vec4i(i32(j)) + vec4i(0, 1, 2, 3) < vec4i(begin));
  return w;
}

@compute @workgroup_size(WG)
fn chunk_scan(
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
  let i0 = id % tiles_t * 8u;
  let c = id / tiles_t % params.nchunks;
  let b = id / (tiles_t * params.nchunks);
  let g = h / (params.nheads / params.ngroups);
  let p1 = next_quad(p0, params.headdim);
  let first = c * params.chunk_size;
  let length = min(params.chunk_size, params.seqlen - first);
  if (i0 >= length) {
    return;
  }
  let row = b * params.seqlen + first;
  let chunk = (b * params.nheads + h) * params.nchunks + c;
  let matrix = ((b * params.nchunks + c) * params.ngroups + g) * params.chunk_size;
  // Positions past the end are computed along with the others, from rows that exist, and not stored.
  let last = vec4u(length - 1u);
  let ia = min(i0 + vec4u(0u, 1u, 2u, 3u), last);
  let ib = min(i0 + vec4u(4u, 5u, 6u, 7u), last);
  let ca = matrix + ia;
  let cb = matrix + ib;
  let aa = load_a(chunk, i0);
  let ab = load_a(chunk, next_quad(i0, params.chunk_size));
  let fa = exp(min(aa - aa.x, vec4f(0.0)));
  let fb = exp(min(ab - aa.x, vec4f(0.0)));
  var ba = vec4i(-1);
  var bb = vec4i(-1);
  @if(documents) {
    let begins = (b * params.nchunks + c) * params.chunk_size;
    ba = vec4i(start[begins + ia.x], start[begins + ia.y], start[begins + ia.z], start[begins + ia.w]);
    bb = vec4i(start[begins + ib.x], start[begins + ib.y], start[begins + ib.z], start[begins + ib.w]);
  }

  var r0 = vec4f(); var r1 = vec4f(); var r2 = vec4f(); var r3 = vec4f();
  var r4 = vec4f(); var r5 = vec4f(); var r6 = vec4f(); var r7 = vec4f();
  var s0 = vec4f(); var s1 = vec4f(); var s2 = vec4f(); var s3 = vec4f();
  var s4 = vec4f(); var s5 = vec4f(); var s6 = vec4f(); var s7 = vec4f();
  for (var j = 0u; j < ib.w; j += 4u) {
    let before = j < i0;
    let aj = load_a(chunk, j);
    let w = load_dt(chunk, j) * select(vec4f(1.0), exp(min(aa.x - aj, vec4f(0.0))), before);
    let xr = (row + min(j + vec4u(0u, 1u, 2u, 3u), last)) * params.nheads + h;
    let X0 = mat4x4f(w.x * load_x(xr.x, p0), w.y * load_x(xr.y, p0), w.z * load_x(xr.z, p0), w.w * load_x(xr.w, p0));
    let X1 = mat4x4f(w.x * load_x(xr.x, p1), w.y * load_x(xr.y, p1), w.z * load_x(xr.z, p1), w.w * load_x(xr.w, p1));
    let w0 = weights(load_CB(ca.x, j), i0, j, aa.x, aj, fa.x, before, ba.x); r0 += X0 * w0; s0 += X1 * w0;
    let w1 = weights(load_CB(ca.y, j), i0 + 1u, j, aa.y, aj, fa.y, before, ba.y); r1 += X0 * w1; s1 += X1 * w1;
    let w2 = weights(load_CB(ca.z, j), i0 + 2u, j, aa.z, aj, fa.z, before, ba.z); r2 += X0 * w2; s2 += X1 * w2;
    let w3 = weights(load_CB(ca.w, j), i0 + 3u, j, aa.w, aj, fa.w, before, ba.w); r3 += X0 * w3; s3 += X1 * w3;
    let w4 = weights(load_CB(cb.x, j), i0 + 4u, j, ab.x, aj, fb.x, before, bb.x); r4 += X0 * w4; s4 += X1 * w4;
    let w5 = weights(load_CB(cb.y, j), i0 + 5u, j, ab.y, aj, fb.y, before, bb.y); r5 += X0 * w5; s5 += X1 * w5;
    let w6 = weights(load_CB(cb.z, j), i0 + 6u, j, ab.z, aj, fb.z, before, bb.z); r6 += X0 * w6; s6 += X1 * w6;
    let w7 = weights(load_CB(cb.w, j), i0 + 7u, j, ab.w, aj, fb.w, before, bb.w); r7 += X0 * w7; s7 += X1 * w7;
  }
  finish(i0, length, row, h, matrix, chunk, p0, p1, r0, s0);
  finish(i0 + 1u, length, row, h, matrix, chunk, p0, p1, r1, s1);
  finish(i0 + 2u, length, row, h, matrix, chunk, p0, p1, r2, s2);
  finish(i0 + 3u, length, row, h, matrix, chunk, p0, p1, r3, s3);
  finish(i0 + 4u, length, row, h, matrix, chunk, p0, p1, r4, s4);
  finish(i0 + 5u, length, row, h, matrix, chunk, p0, p1, r5, s5);
  finish(i0 + 6u, length, row, h, matrix, chunk, p0, p1, r6, s6);
  finish(i0 + 7u, length, row, h, matrix, chunk, p0, p1, r7, s7);
}

fn finish(
  i: u32, length: u32, row: u32, h: u32, matrix: u32, chunk: u32, p0: u32, p1: u32, sum0: vec4f, sum1: vec4f,
) {
  if (i < length) {
    let diagonal = (matrix + i) * params.chunk_size + i;
    let step = chunk * params.chunk_size + i;
    @if(vec4) let self_weight = D[h] + CB[diagonal / 4u][diagonal % 4u] * dt[step / 4u][step % 4u];
    @else let self_weight = D[h] + CB[diagonal] * dt[step];
    let at = (row + i) * params.nheads + h;
    store(at, p0, sum0, self_weight);
    if (p1 > p0) { // a second quad that was moved back onto the first must not be added twice
      store(at, p1, sum1, self_weight);
    }
  }
}
