// Attention, backward to keys and values. With p = exp(scale q k^T - lse) and ds = p * (dout v^T -
// delta):
//
//   dv = sum over queries of p dout, dk = scale * sum over queries of ds q, both over all query heads of the
//   group
//   q, dout [B, L, Hq, Dh] · k, v, dk, dv [B, Lk, Hkv, Dh] · stats = (lse, delta) [B, Hq, L, 2] · seq_idx i32
//   [B, L]
//
// Positions, heads and documents are those of attention.wgsl. One invocation owns four (or two) neighbouring
// key rows of a key/value head and walks over the heads of the group, then over the queries that may see its
// keys; one workgroup owns WG * OWNED keys. The order of the sums is fixed and nothing is added atomically.
// HEAD_VEC4 = Dh / 4 is at most 16. All arithmetic in f32.
import package::lib::index::workgroup_index;
import package::lib::slab::{OWNED, Row, Rows, RowsU, Part, Slab};
import package::lib::slab::{row_numbers, part_dot, slab_add, set_row, get_row};
@if(seq_idx) import package::lib::slab::RowsI;
@if(subgroups) import package::lib::slab::gather_part;

@group(0) @binding(0) var<storage, read> q: array<vec4f>;
@group(0) @binding(1) var<storage, read> k: array<vec4f>;
@group(0) @binding(2) var<storage, read> v: array<vec4f>;
@group(0) @binding(3) var<storage, read> dout: array<vec4f>;
@group(0) @binding(4) var<storage, read> stats: array<vec2f>;
@group(0) @binding(5) var<storage, read_write> dk: array<vec4f>;
@group(0) @binding(6) var<storage, read_write> dv: array<vec4f>;
@if(seq_idx) @group(0) @binding(7) var<storage, read> seq_idx: array<i32>;

struct Params {
  batch: u32,
  seqlen: u32,
  kv_seqlen: u32,
  nheads: u32,
  nkv_heads: u32,
  reach: u32, // query t sees the keys 0 .. t + reach
  scale: f32,
}
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 8;
override HEAD_VEC4: u32 = 8;

fn query(at: u32, d: u32) -> vec4f {
  if (d >= HEAD_VEC4) { return vec4f(); }
  return q[at + d];
}

fn query_part(at: u32, d: u32, quad: u32) -> Part {
  @if(subgroups) return gather_part(query(at, d + quad));
  @else return Part(query(at, d), query(at, d + 1u), query(at, d + 2u), query(at, d + 3u));
}

fn gradient(at: u32, d: u32) -> vec4f {
  if (d >= HEAD_VEC4) { return vec4f(); }
  return dout[at + d];
}

fn gradient_part(at: u32, d: u32, quad: u32) -> Part {
  @if(subgroups) return gather_part(gradient(at, d + quad));
  @else return Part(gradient(at, d), gradient(at, d + 1u), gradient(at, d + 2u), gradient(at, d + 3u));
}

fn attend(tile: u32, lane: u32, quad: u32) {
  let rows = WG * OWNED;
  let ntiles = (params.kv_seqlen + rows - 1u) / rows;
  let hkv = (tile / ntiles) % params.nkv_heads;
  let b = tile / (ntiles * params.nkv_heads);
  if (b >= params.batch) { return; }
  let first = (tile % ntiles) * rows;
  let mine = first + lane * OWNED;
  let position = row_numbers(mine);

  var row: Row;
  var k0 = Slab();
  var k1 = Slab();
  var k2 = Slab();
  var k3 = Slab();
  var v0 = Slab();
  var v1 = Slab();
  var v2 = Slab();
  var v3 = Slab();
  var x0 = Slab();
  var x1 = Slab();
  var x2 = Slab();
  var x3 = Slab();
  var y0 = Slab();
  var y1 = Slab();
  var y2 = Slab();
  var y3 = Slab();
  @if(seq_idx) var documents = RowsI();
  for (var j = mine; j < min(mine + OWNED, params.kv_seqlen); j++) {
    let r = j - mine;
    let at = ((b * params.kv_seqlen + j) * params.nkv_heads + hkv) * HEAD_VEC4;
    for (var i = at; i < at + HEAD_VEC4; i++) { row[i - at] = params.scale * k[i]; }
    set_row(&k0, r, &row, 0u);
    if (HEAD_VEC4 > 4u) { set_row(&k1, r, &row, 4u); }
    if (HEAD_VEC4 > 8u) { set_row(&k2, r, &row, 8u); }
    if (HEAD_VEC4 > 12u) { set_row(&k3, r, &row, 12u); }
    for (var i = at; i < at + HEAD_VEC4; i++) { row[i - at] = v[i]; }
    set_row(&v0, r, &row, 0u);
    if (HEAD_VEC4 > 4u) { set_row(&v1, r, &row, 4u); }
    if (HEAD_VEC4 > 8u) { set_row(&v2, r, &row, 8u); }
    if (HEAD_VEC4 > 12u) { set_row(&v3, r, &row, 12u); }
    @if(seq_idx) documents[r] = seq_idx[b * params.seqlen + j];
  }

  let start = max(first, params.reach) - params.reach; // the first query that sees the first key
  let group = params.nheads / params.nkv_heads;
  for (var h = hkv * group; h < (hkv + 1u) * group; h++) {
    for (var t = start; t < params.seqlen; t++) {
      let at = ((b * params.seqlen + t) * params.nheads + h) * HEAD_VEC4;
      let q0 = query_part(at, 0u, quad);
      let q1 = query_part(at, 4u, quad);
      let q2 = query_part(at, 8u, quad);
      let q3 = query_part(at, 12u, quad);
      let g0 = gradient_part(at, 0u, quad);
      let g1 = gradient_part(at, 4u, quad);
      let g2 = gradient_part(at, 8u, quad);
      let g3 = gradient_part(at, 12u, quad);
      var s = part_dot(q0, k0);
      var dp = part_dot(g0, v0);
      if (HEAD_VEC4 > 4u) {
        s += part_dot(q1, k1);
        dp += part_dot(g1, v1);
      }
      if (HEAD_VEC4 > 8u) {
        s += part_dot(q2, k2);
        dp += part_dot(g2, v2);
      }
      if (HEAD_VEC4 > 12u) {
        s += part_dot(q3, k3);
        dp += part_dot(g3, v3);
      }

      let stat = stats[(b * params.nheads + h) * params.seqlen + t];
      var seen = RowsU(t + params.reach) >= position;
      @if(seq_idx) seen &= documents == RowsI(seq_idx[b * params.seqlen + t]);
      // The exponent is held at 0: the score of a masked key may exceed lse by any amount.
      let p = select(Rows(), exp(min(s - stat.x, Rows())), seen);
      let ds = p * (dp - stat.y);
      x0 = slab_add(x0, q0, ds);
      y0 = slab_add(y0, g0, p);
      if (HEAD_VEC4 > 4u) {
        x1 = slab_add(x1, q1, ds);
        y1 = slab_add(y1, g1, p);
      }
      if (HEAD_VEC4 > 8u) {
        x2 = slab_add(x2, q2, ds);
        y2 = slab_add(y2, g2, p);
      }
      if (HEAD_VEC4 > 12u) {
        x3 = slab_add(x3, q3, ds);
        y3 = slab_add(y3, g3, p);
      }
    }
  }

  for (var j = mine; j < min(mine + OWNED, params.kv_seqlen); j++) {
    let r = j - mine;
    let at = ((b * params.kv_seqlen + j) * params.nkv_heads + hkv) * HEAD_VEC4;
    get_row(x0, r, &row, 0u);
    if (HEAD_VEC4 > 4u) { get_row(x1, r, &row, 4u); }
    if (HEAD_VEC4 > 8u) { get_row(x2, r, &row, 8u); }
    if (HEAD_VEC4 > 12u) { get_row(x3, r, &row, 12u); }
    for (var i = at; i < at + HEAD_VEC4; i++) { dk[i] = params.scale * row[i - at]; }
    get_row(y0, r, &row, 0u);
    if (HEAD_VEC4 > 4u) { get_row(y1, r, &row, 4u); }
    if (HEAD_VEC4 > 8u) { get_row(y2, r, &row, 8u); }
    if (HEAD_VEC4 > 12u) { get_row(y3, r, &row, 12u); }
    for (var i = at; i < at + HEAD_VEC4; i++) { dv[i] = row[i - at]; }
  }
}

@if(subgroups)
@compute @workgroup_size(WG)
fn attention_dkv(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32, @builtin(subgroup_invocation_id) subgroup_lane: u32,
) {
  attend(workgroup_index(wid, nwg), lane, subgroup_lane % 4u);
}
@else
@compute @workgroup_size(WG)
fn attention_dkv(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  attend(workgroup_index(wid, nwg), lane, 0u);
}
