// Cuts the rows of each expert into tiles: tiles[i] = (expert, first row, end row, 0).
//
// offsets [E + 1]: expert e owns rows offsets[e] .. offsets[e + 1]. Tiles of one expert are neighbours, and
// no tile holds rows of two experts. The host knows only an upper bound on their number; the rest of the
// table is (0, 0, 0, 0), a tile without rows. One invocation writes one entry: it walks the experts until
// their tiles reach its own number.

import package::lib::index::workgroup_index;

struct Params { experts: u32, rows: u32, tile_rows: u32, count: u32 }

@group(0) @binding(0) var<storage, read> offsets: array<u32>;
@group(0) @binding(1) var<storage, read_write> tiles: array<vec4u>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 32;

@compute @workgroup_size(WG)
fn grouped_tiles(
  @builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) wid: vec3u,
  @builtin(num_workgroups) nwg: vec3u,
) {
  let i = workgroup_index(wid, nwg) * WG + lane;
  if (i >= params.count) { return; }
  var before = 0u;                            // tiles of the experts walked past
  var found = vec4u();
  var begin = min(offsets[0], params.rows);
  for (var e = 0u; e < params.experts; e++) {
    let end = clamp(offsets[e + 1u], begin, params.rows); // an offset never leads out of the rows
    let here = (end - begin + params.tile_rows - 1u) / params.tile_rows;
    if (i >= before && i < before + here) {
      found = vec4u(e, begin + (i - before) * params.tile_rows, end, 0u);
    }
    before += here;
    begin = end;
  }
  tiles[i] = vec4u(found.x, found.y, min(found.z, found.y + params.tile_rows), 0u);
}
