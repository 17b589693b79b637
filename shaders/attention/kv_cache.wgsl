// Keys or values of new tokens into a cache, and a cache's first positions out of it.
//
//   x [B, L, Hkv, Dh] · cache [B, Hkv, Lmax, Dh] · position u32 [1], where the first new token goes
//
// write: cache[b, h, position + t] = x[b, t, h]; positions from Lmax on are dropped. read: x[b, t, h] =
// cache[b, h, t].
// One invocation moves one element.
//
// write_codes, read_codes: the same for a cache of E4M3 codes, four to a word, which times `scale` are the
// elements. One invocation moves one word; head_dim then counts words.
import package::lib::e4m3::four_e4m3;
import package::lib::exact::quotient_code;
import package::lib::formats::E4M3;
import package::lib::index::workgroup_index;

override WG: u32 = 64;

struct Params {
  count: u32,
  seqlen: u32,
  nkv_heads: u32,
  head_dim: u32,
  capacity: u32,
  scale: f32,
}

@group(0) @binding(0) var<storage, read> new_x: array<f32>;
@group(0) @binding(1) var<storage, read_write> cache: array<f32>;
@group(0) @binding(2) var<storage, read> position: array<u32>;
@group(0) @binding(3) var<storage, read> old_cache: array<f32>;
@group(0) @binding(4) var<storage, read_write> tokens: array<f32>;
@group(0) @binding(5) var<storage, read_write> codes: array<u32>;
@group(0) @binding(6) var<storage, read> old_codes: array<u32>;
@group(1) @binding(0) var<uniform> params: Params;

// Place of element i of x (t, and where it lies in the cache when x starts at position `start`).
fn place(i: u32, start: u32) -> vec2u {
  let d = i % params.head_dim;
  let h = i / params.head_dim % params.nkv_heads;
  let t = i / (params.head_dim * params.nkv_heads) % params.seqlen + start;
  let b = i / (params.head_dim * params.nkv_heads * params.seqlen);
  return vec2u(t, ((b * params.nkv_heads + h) * params.capacity + t) * params.head_dim + d);
}

@compute @workgroup_size(WG)
fn write_tokens(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let i = workgroup_index(wid, nwg) * WG + lane;
  if (i >= params.count) { return; }
  let at = place(i, position[0]);
  if (at.x < params.capacity) { cache[at.y] = new_x[i]; }
}

@compute @workgroup_size(WG)
fn read_tokens(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let i = workgroup_index(wid, nwg) * WG + lane;
  if (i >= params.count) { return; }
  tokens[i] = old_cache[place(i, 0u).y];
}

fn code_of(number: f32) -> u32 {
  return quotient_code(bitcast<u32>(number), bitcast<u32>(params.scale), E4M3);
}

@compute @workgroup_size(WG)
fn write_codes(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let i = workgroup_index(wid, nwg) * WG + lane;
  if (i >= params.count) { return; }
  let at = place(i, position[0]);
  if (at.x >= params.capacity) { return; }
  codes[at.y] = code_of(new_x[4u * i]) | (code_of(new_x[4u * i + 1u]) << 8u)
    | (code_of(new_x[4u * i + 2u]) << 16u) | (code_of(new_x[4u * i + 3u]) << 24u);
}

@compute @workgroup_size(WG)
fn read_codes(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let i = workgroup_index(wid, nwg) * WG + lane;
  if (i >= params.count) { return; }
  let values = params.scale * four_e4m3(old_codes[place(i, 0u).y]);
  for (var c = 0u; c < 4u; c++) { tokens[4u * i + c] = values[c]; }
}
