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
import package::lib::tile::{next_quad, quad_indices};

struct Params {
  seqlen: u32,
  nheads: u32,
  headdim: u32,
  ngroups: u32,
  nchunks: u32,
  chunk_size: u32,
  total: u32, // batch * nchunks * ceil(chunk_size / 8) * nheads * ceil(headdim / 8)
}

@if(vec4) @group(0) @binding(0) var<storage, read> x: array<vec4f>;
@else @group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read> CB: array<f32>;
@group(0) @binding(2) var<storage, read> dt: array<f32>;
@group(0) @binding(3) var<storage, read> dA_cumsum: array<f32>;
@group(0) @binding(4) var<storage, read> D: array<f32>;
@group(0) @binding(5) var<storage, read> start: array<i32>; // read with the condition `documents` only
@if(vec4) @group(0) @binding(6) var<storage, read_write> off: array<vec4f>;
@else @group(0) @binding(6) var<storage, read_write> off: array<f32>;
@if(vec4) @group(0) @binding(7) var<storage, read_write> y: array<vec4f>;
@else @group(0) @binding(7) var<storage, read_write> y: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;

@if(vec4) fn load_x(row: u32, p: u32) -> vec4f {
  return x[(row * params.headdim + p) / 4u];
}
@else fn load_x(row: u32, p: u32) -> vec4f {
  let at = quad_indices(row, p, params.headdim);
  return vec4f(x[at.x], x[at.y], x[at.z], x[at.w]);
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
  let steps = ((b * params.nheads + h) * params.nchunks + c) * params.chunk_size;
  let matrix = ((b * params.nchunks + c) * params.ngroups + g) * params.chunk_size;
  // Positions past the end are computed along with the others, from rows that exist, and not stored.
  let ia = min(i0 + vec4u(0u, 1u, 2u, 3u), vec4u(length - 1u));
  let ib = min(i0 + vec4u(4u, 5u, 6u, 7u), vec4u(length - 1u));
  let ca = (matrix + ia) * params.chunk_size;
  let cb = (matrix + ib) * params.chunk_size;
  let aa = vec4f(dA_cumsum[steps + ia.x], dA_cumsum[steps + ia.y], dA_cumsum[steps + ia.z], dA_cumsum[steps + ia.w]);
  let ab = vec4f(dA_cumsum[steps + ib.x], dA_cumsum[steps + ib.y], dA_cumsum[steps + ib.z], dA_cumsum[steps + ib.w]);
  let fa = exp(min(aa - aa.x, vec4f(0.0)));
  let fb = exp(min(ab - aa.x, vec4f(0.0)));
  @if(documents) let begins = (b * params.nchunks + c) * params.chunk_size;
  @if(documents) let ba = vec4i(start[begins + ia.x], start[begins + ia.y], start[begins + ia.z], start[begins + ia.w]);
  @if(documents) let bb = vec4i(start[begins + ib.x], start[begins + ib.y], start[begins + ib.z], start[begins + ib.w]);

  var r0 = vec4f(); var r1 = vec4f(); var r2 = vec4f(); var r3 = vec4f();
  var r4 = vec4f(); var r5 = vec4f(); var r6 = vec4f(); var r7 = vec4f();
  var s0 = vec4f(); var s1 = vec4f(); var s2 = vec4f(); var s3 = vec4f();
  var s4 = vec4f(); var s5 = vec4f(); var s6 = vec4f(); var s7 = vec4f();
  for (var j = 0u; j < ib.w; j++) {
    let a_j = dA_cumsum[steps + j];
    var wa = vec4f(CB[ca.x + j], CB[ca.y + j], CB[ca.z + j], CB[ca.w + j]);
    var wb = vec4f(CB[cb.x + j], CB[cb.y + j], CB[cb.z + j], CB[cb.w + j]);
    if (j < i0) {
      let before = exp(min(aa.x - a_j, 0.0));
      wa *= before * fa;
      wb *= before * fb;
    } else {
      wa = select(vec4f(0.0), wa * exp(min(aa - a_j, vec4f(0.0))), vec4u(j) < ia);
      wb = select(vec4f(0.0), wb * exp(min(ab - a_j, vec4f(0.0))), vec4u(j) < ib);
    }
    @if(documents) wa = select(wa, vec4f(0.0), vec4i(i32(j)) < ba);
    @if(documents) wb = select(wb, vec4f(0.0), vec4i(i32(j)) < bb);
    let step = dt[steps + j];
    let x0 = step * load_x((row + j) * params.nheads + h, p0);
    let x1 = step * load_x((row + j) * params.nheads + h, p1);
    r0 += wa.x * x0; s0 += wa.x * x1;
    r1 += wa.y * x0; s1 += wa.y * x1;
    r2 += wa.z * x0; s2 += wa.z * x1;
    r3 += wa.w * x0; s3 += wa.w * x1;
    r4 += wb.x * x0; s4 += wb.x * x1;
    r5 += wb.y * x0; s5 += wb.y * x1;
    r6 += wb.z * x0; s6 += wb.z * x1;
    r7 += wb.w * x0; s7 += wb.w * x1;
  }
  let sums = array<vec4f, 16>(r0, s0, r1, s1, r2, s2, r3, s3, r4, s4, r5, s5, r6, s6, r7, s7);
  for (var i = i0; i < min(i0 + 8u, length); i++) {
    let self_weight = D[h] + CB[(matrix + i) * params.chunk_size + i] * dt[steps + i];
    let at = (row + i) * params.nheads + h;
    store(at, p0, sums[2u * (i - i0)], self_weight);
    if (p1 > p0) { // a second quad that was moved back onto the first must not be added twice
      store(at, p1, sums[2u * (i - i0) + 1u], self_weight);
    }
  }
}
