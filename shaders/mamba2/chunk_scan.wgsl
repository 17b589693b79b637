// y_i[p] = off_i[p] + CB_ii dt_i x_i[p] + D x_i[p],
// off_i  = (what off holds on entry) + sum_{j<i} CB_ij exp(a_i - a_j) dt_j x_j, within each chunk.
//
// CB [B,nC,G,Q,Q], x, off and y [B,L,H,P], dt and dA_cumsum (= a) [B,H,nC,Q], D [H]; f32 sums in order of j.
// On entry `off` is the entering state's part, exp(a_i) (prev_state C_i) (apply_state.wgsl); on exit it is
// all of y that depends on a, which the backward pass wants. Pairs of different documents are left out (start
// [B,nC,Q], see document_start.wgsl).
// Source: Mamba-2, arXiv 2405.21060, section 6.
//
// One invocation computes a tile of 8 positions i by 8 p. Before the tile (j < i0) the decay is split into
// exp(a_i - a_i0) exp(a_i0 - a_j): one exp per j, not one per pair. Both exponents are <= 0, as a never
// increases, so the split neither overflows nor loses what the product would keep; exp(a_i) exp(-a_j) would
// do both. Masks come after exp. Two loops and no branch: SwiftShader runs both sides of a branch.

import package::lib::index::workgroup_index;
import package::lib::tile::{Tile, add_dots, add_outer, sums_of, next_quad, four, quad_indices};

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

@if(vec4) fn element(at: u32) -> f32 {
  return CB[at / 4u][at % 4u];
}
@else fn element(at: u32) -> f32 {
  return CB[at];
}

@if(vec4) fn load_CB(at: u32) -> vec4f {
  return CB[at / 4u];
}
@else fn load_CB(at: u32) -> vec4f {
  return vec4f(CB[at], CB[at + 1u], CB[at + 2u], CB[at + 3u]);
}

fn load_a(at: vec4u) -> vec4f {
  return vec4f(dA_cumsum[at.x], dA_cumsum[at.y], dA_cumsum[at.z], dA_cumsum[at.w]);
}

fn load_dt(at: vec4u) -> vec4f {
  return vec4f(dt[at.x], dt[at.y], dt[at.z], dt[at.w]);
}

// Where documents begin; without the condition, before every chunk.
@if(documents) fn load_start(at: vec4u) -> vec4i {
  return vec4i(start[at.x], start[at.y], start[at.z], start[at.w]);
}
@else fn load_start(at: vec4u) -> vec4i {
  return vec4i(-1);
}

@if(vec4) fn load_x(row: u32, p: u32) -> vec4f {
  return x[(row * params.headdim + p) / 4u];
}
@else fn load_x(row: u32, p: u32) -> vec4f {
  let at = quad_indices(row, p, params.headdim);
  return vec4f(x[at.x], x[at.y], x[at.z], x[at.w]);
}

// Four elements of a row of CB times its factor; the first lies `since` behind the document's start.
fn CB_row(at: u32, factor: f32, since: i32) -> vec4f {
  let w = load_CB(at) * factor;
  @if(documents) return select(vec4f(), w, vec4i(since) + vec4i(0, 1, 2, 3) >= vec4i());
  @else return w;
}

fn CB_rows(at: vec4u, factor: vec4f, since: vec4i) -> mat4x4f {
  return mat4x4f(CB_row(at.x, factor.x, since.x), CB_row(at.y, factor.y, since.y),
    CB_row(at.z, factor.z, since.z), CB_row(at.w, factor.w, since.w));
}

// x of four positions times their weights, as rows of four positions each.
fn x_columns(rows: vec4u, p: u32, weight: vec4f) -> mat4x4f {
  return transpose(mat4x4f(weight.x * load_x(rows.x, p), weight.y * load_x(rows.y, p),
    weight.z * load_x(rows.z, p), weight.w * load_x(rows.w, p)));
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
  // Positions past the end repeat the last one and are not stored.
  let ia = four(i0, length - 1u);
  let ib = four(i0 + 4u, length - 1u);
  let ca = (matrix + ia) * params.chunk_size;
  let cb = (matrix + ib) * params.chunk_size;
  let aa = load_a(steps + ia);
  let ab = load_a(steps + ib);
  let fa = exp(min(aa - aa.x, vec4f()));
  let fb = exp(min(ab - aa.x, vec4f()));
  let begins = (b * params.nchunks + c) * params.chunk_size;
  let ba = load_start(begins + ia);
  let bb = load_start(begins + ib);

  var tile = Tile();
  for (var j = 0u; j < i0; j += 4u) { // i0 is a multiple of 8
    let four_j = j + vec4u(0u, 1u, 2u, 3u);
    let step = load_dt(steps + four_j) * exp(min(aa.x - load_a(steps + four_j), vec4f()));
    let r = (row + four_j) * params.nheads + h;
    add_dots(&tile, CB_rows(ca + j, fa, vec4i(i32(j)) - ba), CB_rows(cb + j, fb, vec4i(i32(j)) - bb),
      x_columns(r, p0, step), x_columns(r, p1, step));
  }
  for (var j = i0; j < ib.w; j++) {
    let a_j = dA_cumsum[steps + j];
    let step = dt[steps + j];
    var wa = vec4f(element(ca.x + j), element(ca.y + j), element(ca.z + j), element(ca.w + j));
    var wb = vec4f(element(cb.x + j), element(cb.y + j), element(cb.z + j), element(cb.w + j));
    wa = select(vec4f(), wa * exp(min(aa - a_j, vec4f())), (vec4u(j) < ia) & (vec4i(i32(j)) >= ba));
    wb = select(vec4f(), wb * exp(min(ab - a_j, vec4f())), (vec4u(j) < ib) & (vec4i(i32(j)) >= bb));
    let x_row = (row + j) * params.nheads + h;
    add_outer(&tile, wa, wb, step * load_x(x_row, p0), step * load_x(x_row, p1));
  }
  let sums = sums_of(tile);
  for (var k = 0u; k < 8u && i0 + k < length; k++) {
    let i = i0 + k;
    let self_weight = D[h] + element((matrix + i) * params.chunk_size + i) * dt[steps + i];
    let at = (row + i) * params.nheads + h;
    store(at, p0, sums[2u * k], self_weight);
    if (p1 > p0) { // a second quad that was moved back onto the first must not be added twice
      store(at, p1, sums[2u * k + 1u], self_weight);
    }
  }
}
