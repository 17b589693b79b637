// z_j[p] = sum_{i>j} CB_ij exp(a_i - a_j) dy_i[p] within each chunk: the gradient of dt_j x_j, less its diagonal term.
//
// CB [B,nC,G,Q,Q], dy and z [B,L,H,P], dA_cumsum (= a) [B,H,nC,Q]; f32 sums in order of i. Pairs of different documents are
// left out (start [B,nC,Q], see document_start.wgsl).
//
// One invocation computes a tile of 8 positions j by 8 p in registers. Behind the tile (i > jl, its last position) the decay
// is split into exp(a_i - a_jl) exp(a_jl - a_j), both with exponents <= 0: one exp per i, not one per pair.

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
@if(vec4) @group(0) @binding(1) var<storage, read> dy: array<vec4f>;
@else @group(0) @binding(1) var<storage, read> dy: array<f32>;
@group(0) @binding(2) var<storage, read> dA_cumsum: array<f32>;
@group(0) @binding(3) var<storage, read> start: array<i32>; // read with the condition `documents` only
@if(vec4) @group(0) @binding(4) var<storage, read_write> z: array<vec4f>;
@else @group(0) @binding(4) var<storage, read_write> z: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;

@if(vec4) fn load_CB(row: u32, j: u32) -> vec4f {
  return CB[(row * params.chunk_size + j) / 4u];
}
@else fn load_CB(row: u32, j: u32) -> vec4f {
  let at = quad_indices(row, j, params.chunk_size);
  return vec4f(CB[at.x], CB[at.y], CB[at.z], CB[at.w]);
}

@if(vec4) fn load_dy(row: u32, p: u32) -> vec4f {
  return dy[(row * params.headdim + p) / 4u];
}
@else fn load_dy(row: u32, p: u32) -> vec4f {
  let at = quad_indices(row, p, params.headdim);
  return vec4f(dy[at.x], dy[at.y], dy[at.z], dy[at.w]);
}

fn load_a(chunk: u32, q: u32) -> vec4f {
  let at = quad_indices(chunk, q, params.chunk_size);
  return vec4f(dA_cumsum[at.x], dA_cumsum[at.y], dA_cumsum[at.z], dA_cumsum[at.w]);
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
  let j1 = next_quad(j0, params.chunk_size);
  let row = b * params.seqlen + first;
  let chunk = (b * params.nheads + h) * params.nchunks + c;
  let matrix = ((b * params.nchunks + c) * params.ngroups + g) * params.chunk_size;
  let begins = (b * params.nchunks + c) * params.chunk_size;
  let aa = load_a(chunk, j0);
  let ab = load_a(chunk, j1);
  let a_last = ab.w;
  let fa = exp(min(a_last - aa, vec4f(0.0)));
  let fb = exp(min(a_last - ab, vec4f(0.0)));

  var r0 = vec4f(); var r1 = vec4f(); var r2 = vec4f(); var r3 = vec4f();
  var r4 = vec4f(); var r5 = vec4f(); var r6 = vec4f(); var r7 = vec4f();
  var s0 = vec4f(); var s1 = vec4f(); var s2 = vec4f(); var s3 = vec4f();
  var s4 = vec4f(); var s5 = vec4f(); var s6 = vec4f(); var s7 = vec4f();
  for (var i = j0 + 1u; i < length; i++) {
    let a_i = dA_cumsum[chunk * params.chunk_size + i];
    var wa = load_CB(matrix + i, j0);
    var wb = load_CB(matrix + i, j1);
    if (i > j0 + 7u) {
      let after = exp(min(a_i - a_last, 0.0));
      wa *= after * fa;
      wb *= after * fb;
    } else {
      wa = select(vec4f(0.0), wa * exp(min(a_i - aa, vec4f(0.0))), below(j0, i));
      wb = select(vec4f(0.0), wb * exp(min(a_i - ab, vec4f(0.0))), below(j1, i));
    }
    @if(documents) {
      let begin = start[begins + i];
      wa = select(wa, vec4f(0.0), vec4i(i32(j0)) + vec4i(0, 1, 2, 3) < vec4i(begin));
      wb = select(wb, vec4f(0.0), vec4i(i32(j1)) + vec4i(0, 1, 2, 3) < vec4i(begin));
    }
    let d0 = load_dy((row + i) * params.nheads + h, p0);
    let d1 = load_dy((row + i) * params.nheads + h, p1);
    r0 += wa.x * d0; s0 += wa.x * d1;
    r1 += wa.y * d0; s1 += wa.y * d1;
    r2 += wa.z * d0; s2 += wa.z * d1;
    r3 += wa.w * d0; s3 += wa.w * d1;
    r4 += wb.x * d0; s4 += wb.x * d1;
    r5 += wb.y * d0; s5 += wb.y * d1;
    r6 += wb.z * d0; s6 += wb.z * d1;
    r7 += wb.w * d0; s7 += wb.w * d1;
  }
  let sums = array<vec4f, 16>(r0, s0, r1, s1, r2, s2, r3, s3, r4, s4, r5, s5, r6, s6, r7, s7);
  for (var k = 0u; k < 8u; k++) {
    let j = select(j1 + k - 4u, j0 + k, k < 4u);
    if (j < length) {
      store((row + j) * params.nheads + h, p0, sums[2u * k]);
      store((row + j) * params.nheads + h, p1, sums[2u * k + 1u]);
    }
  }
}
