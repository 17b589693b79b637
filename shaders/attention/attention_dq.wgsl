// Attention, backward to the queries. With p = exp(scale q k^T - lse) and dp = dout v^T:
//
//   dq = scale * ds k, ds = p * (dp - delta)
//   q, dout, dq [B, L, Hq, Dh] · k, v [B, Lk, Hkv, Dh] · stats = (lse, delta) [B, Hq, L, 2] · seq_idx i32 [B,
//   L]
//
// Positions, heads, documents and the sharing of the work are those of attention.wgsl: one invocation owns a
// few query rows and walks over the keys. HEAD_VEC4 = Dh / 4 is at most 16. All arithmetic in f32. Masked
// weights are set to zero after exp. Source: Dao 2023 (arXiv 2307.08691), algorithm 2.
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
@group(0) @binding(5) var<storage, read_write> dq: array<vec4f>;
@if(seq_idx) @group(0) @binding(6) var<storage, read> seq_idx: array<i32>;

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

fn key(at: u32, d: u32) -> vec4f {
  if (d >= HEAD_VEC4) { return vec4f(); }
  return k[at + d];
}

fn key_part(at: u32, d: u32, quad: u32) -> Part {
  @if(subgroups) return gather_part(key(at, d + quad));
  @else return Part(key(at, d), key(at, d + 1u), key(at, d + 2u), key(at, d + 3u));
}

fn value(at: u32, d: u32) -> vec4f {
  if (d >= HEAD_VEC4) { return vec4f(); }
  return v[at + d];
}

fn value_part(at: u32, d: u32, quad: u32) -> Part {
  @if(subgroups) return gather_part(value(at, d + quad));
  @else return Part(value(at, d), value(at, d + 1u), value(at, d + 2u), value(at, d + 3u));
}

fn attend(tile: u32, lane: u32, quad: u32) {
  let rows = WG * OWNED;
  let ntiles = (params.seqlen + rows - 1u) / rows;
  let h = (tile / ntiles) % params.nheads;
  let b = tile / (ntiles * params.nheads);
  if (b >= params.batch) { return; }
  let first = (tile % ntiles) * rows;
  let mine = first + lane * OWNED;
  let kv_head = b * params.kv_seqlen * params.nkv_heads + h / (params.nheads / params.nkv_heads);
  let position = row_numbers(mine + params.reach);

  var row: Row;
  var q0 = Slab();
  var q1 = Slab();
  var q2 = Slab();
  var q3 = Slab();
  var g0 = Slab();
  var g1 = Slab();
  var g2 = Slab();
  var g3 = Slab();
  var x0 = Slab();
  var x1 = Slab();
  var x2 = Slab();
  var x3 = Slab();
  var lse = Rows();
  var delta = Rows();
  @if(seq_idx) var documents = RowsI();
  for (var t = mine; t < min(mine + OWNED, params.seqlen); t++) {
    let r = t - mine;
    let at = ((b * params.seqlen + t) * params.nheads + h) * HEAD_VEC4;
    for (var i = at; i < at + HEAD_VEC4; i++) { row[i - at] = params.scale * q[i]; }
    set_row(&q0, r, &row, 0u);
    if (HEAD_VEC4 > 4u) { set_row(&q1, r, &row, 4u); }
    if (HEAD_VEC4 > 8u) { set_row(&q2, r, &row, 8u); }
    if (HEAD_VEC4 > 12u) { set_row(&q3, r, &row, 12u); }
    for (var i = at; i < at + HEAD_VEC4; i++) { row[i - at] = dout[i]; }
    set_row(&g0, r, &row, 0u);
    if (HEAD_VEC4 > 4u) { set_row(&g1, r, &row, 4u); }
    if (HEAD_VEC4 > 8u) { set_row(&g2, r, &row, 8u); }
    if (HEAD_VEC4 > 12u) { set_row(&g3, r, &row, 12u); }
    let stat = stats[(b * params.nheads + h) * params.seqlen + t];
    lse[r] = stat.x;
    delta[r] = stat.y;
    @if(seq_idx) documents[r] = seq_idx[b * params.seqlen + t];
  }

  let end = min(min(first + rows, params.seqlen) + params.reach, params.kv_seqlen);
  for (var j = 0u; j < end; j++) {
    let at = (kv_head + j * params.nkv_heads) * HEAD_VEC4;
    let k0 = key_part(at, 0u, quad);
    let k1 = key_part(at, 4u, quad);
    let k2 = key_part(at, 8u, quad);
    let k3 = key_part(at, 12u, quad);
    var s = part_dot(k0, q0);
    var dp = part_dot(value_part(at, 0u, quad), g0);
    if (HEAD_VEC4 > 4u) {
      s += part_dot(k1, q1);
      dp += part_dot(value_part(at, 4u, quad), g1);
    }
    if (HEAD_VEC4 > 8u) {
      s += part_dot(k2, q2);
      dp += part_dot(value_part(at, 8u, quad), g2);
    }
    if (HEAD_VEC4 > 12u) {
      s += part_dot(k3, q3);
      dp += part_dot(value_part(at, 12u, quad), g3);
    }

    var seen = position >= RowsU(j);
    @if(seq_idx) seen &= documents == RowsI(seq_idx[b * params.seqlen + j]);
    // The exponent is held at 0: the score of a masked key may exceed lse by any amount.
    let ds = select(Rows(), exp(min(s - lse, Rows())) * (dp - delta), seen);
    x0 = slab_add(x0, k0, ds);
    if (HEAD_VEC4 > 4u) { x1 = slab_add(x1, k1, ds); }
    if (HEAD_VEC4 > 8u) { x2 = slab_add(x2, k2, ds); }
    if (HEAD_VEC4 > 12u) { x3 = slab_add(x3, k3, ds); }
  }

  for (var t = mine; t < min(mine + OWNED, params.seqlen); t++) {
    let r = t - mine;
    let at = ((b * params.seqlen + t) * params.nheads + h) * HEAD_VEC4;
    get_row(x0, r, &row, 0u);
    if (HEAD_VEC4 > 4u) { get_row(x1, r, &row, 4u); }
    if (HEAD_VEC4 > 8u) { get_row(x2, r, &row, 8u); }
    if (HEAD_VEC4 > 12u) { get_row(x3, r, &row, 12u); }
    for (var i = at; i < at + HEAD_VEC4; i++) { dq[i] = params.scale * row[i - at]; }
  }
}

@if(subgroups)
@compute @workgroup_size(WG)
fn attention_dq(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32, @builtin(subgroup_invocation_id) subgroup_lane: u32,
) {
  attend(workgroup_index(wid, nwg), lane, subgroup_lane % 4u);
}
@else
@compute @workgroup_size(WG)
fn attention_dq(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  attend(workgroup_index(wid, nwg), lane, 0u);
}
