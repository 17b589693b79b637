// Which row goes where in an exchange of rows that every rank holds sorted by group (expert, or destination).
//
//   all u32 [sources, width]: rows all[s, g] .. all[s, g + 1] of rank s belong to group g < G
//   Block b of G / blocks groups goes to its `copies` ranks. There the rows lie by group, then source, then
//   in their order: chunk (g, s) of a rank has its own place for every group of its block and every source.
//
// scan, one workgroup:
//   starts [G / blocks * sources + 1]: where the chunks of the own block begin, and their end
//   there  [G]: where the own chunk of each group begins at its destination
//   offsets [G / blocks + 1]: where the groups of the own block begin, at most `limit`
//   splits [blocks + sources]: own rows for every block; rows from every source for the own block
//   missing [1]: rows for the own block that do not fit `rows`
// tables, one invocation per row:
//   from_table [rows]: of a row that arrives source * sends + its row there
//   to_table [sends, copies]: of an own row (block * copies + copy) * rows + its row there
//   with NONE for rows that are nobody's or find no place.
// limited: offsets [width] are those of all [1, width], at most `limit`, and missing what the last one loses
// Source: the exchanges of Megatron Core's token dispatchers, with counts that stay on the GPU.
import package::lib::index::workgroup_index;

override WG: u32 = 64;
const NONE: u32 = 0xffffffffu;

struct Params {
  sources: u32,
  width: u32,
  groups: u32,
  blocks: u32,
  copies: u32,
  own: u32,   // number among the sources
  block: u32, // that this rank receives
  rows: u32,
  sends: u32,
  limit: u32,
}

@group(0) @binding(0) var<storage, read> all: array<u32>;
@group(0) @binding(1) var<storage, read_write> starts: array<u32>;
@group(0) @binding(2) var<storage, read_write> there: array<u32>;
@group(0) @binding(3) var<storage, read_write> bases: array<u32>; // [blocks], scratch
@group(0) @binding(4) var<storage, read_write> offsets: array<u32>;
@group(0) @binding(5) var<storage, read_write> splits: array<u32>;
@group(0) @binding(6) var<storage, read_write> missing: array<u32>;
@group(0) @binding(7) var<storage, read_write> from_table: array<u32>;
@group(0) @binding(8) var<storage, read_write> to_table: array<u32>;
@group(1) @binding(0) var<uniform> params: Params;

var<workgroup> lane_total: array<u32, WG>;

fn count(source: u32, group: u32) -> u32 {
  let at = source * params.width + group;
  return all[at + 1u] - all[at];
}

fn group_total(group: u32) -> u32 {
  var sum = 0u;
  for (var s = 0u; s < params.sources; s++) {
    sum += count(s, group);
  }
  return sum;
}

@compute @workgroup_size(WG)
fn scan(@builtin(local_invocation_index) lane: u32) {
  let per_block = params.groups / params.blocks;
  let size = (params.groups + WG - 1u) / WG;
  let first = lane * size;
  let end = min(first + size, params.groups);
  var sum = 0u;
  for (var g = first; g < end; g++) {
    sum += group_total(g);
  }
  lane_total[lane] = sum;
  workgroupBarrier();
  sum = 0u;
  for (var before = 0u; before < lane; before++) {
    sum += lane_total[before];
  }
  let own_first = params.block * per_block;
  let own_end = own_first + per_block;
  // Places as if all blocks went to one rank; where each begins is taken off below.
  for (var g = first; g < end; g++) {
    if (g % per_block == 0u) {
      bases[g / per_block] = sum;
    }
    for (var s = 0u; s < params.sources; s++) {
      if (s == params.own) {
        there[g] = sum;
      }
      if (g >= own_first && g < own_end) {
        starts[(g - own_first) * params.sources + s] = sum;
      }
      sum += count(s, g);
    }
    if (g + 1u == own_end) {
      starts[per_block * params.sources] = sum;
    }
  }
  storageBarrier();
  for (var g = lane; g < params.groups; g += WG) {
    there[g] -= bases[g / per_block];
  }
  let base = bases[params.block];
  for (var i = lane; i <= per_block * params.sources; i += WG) {
    let start = starts[i] - base;
    starts[i] = start;
    if (i % params.sources == 0u) {
      offsets[i / params.sources] = min(start, params.limit);
    }
    if (i == per_block * params.sources) {
      missing[0] = max(start, params.rows) - params.rows;
    }
  }
  for (var i = lane; i < params.blocks + params.sources; i += WG) {
    let sends = i < params.blocks;
    let row = select(i - params.blocks, params.own, sends) * params.width;
    let from_group = select(params.block, i, sends) * per_block;
    splits[i] = all[row + from_group + per_block] - all[row + from_group];
  }
}

@compute @workgroup_size(WG)
fn tables(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let i = workgroup_index(wid, nwg) * WG + lane;
  let per_block = params.groups / params.blocks;
  if (i < params.rows) {
    var entry = NONE;
    let chunks = per_block * params.sources;
    if (i < starts[chunks]) {
      // The last chunk that begins at or before i; those without rows begin where the next one does.
      var low = 0u;
      var high = chunks;
      while (high - low > 1u) {
        let middle = (low + high) / 2u;
        if (starts[middle] <= i) {
          low = middle;
        } else {
          high = middle;
        }
      }
      let source = low % params.sources;
      let group = params.block * per_block + low / params.sources;
      let row = all[source * params.width + group] + i - starts[low];
      if (row < params.sends) { entry = source * params.sends + row; }
    }
    from_table[i] = entry;
  }
  if (i < params.sends) {
    let own = params.own * params.width;
    var destination = 0u;
    var row = NONE;
    if (i < all[own + params.groups]) {
      var low = 0u;
      var high = params.groups;
      while (high - low > 1u) {
        let middle = (low + high) / 2u;
        if (all[own + middle] <= i) {
          low = middle;
        } else {
          high = middle;
        }
      }
      destination = low / per_block;
      row = there[low] + i - all[own + low];
    }
    for (var copy = 0u; copy < params.copies; copy++) {
      let at = (destination * params.copies + copy) * params.rows + row;
      to_table[i * params.copies + copy] = select(NONE, at, row < params.rows);
    }
  }
}

@compute @workgroup_size(WG)
fn limited(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let i = workgroup_index(wid, nwg) * WG + lane;
  if (i >= params.width) { return; }
  offsets[i] = min(all[i], params.limit);
  if (i + 1u == params.width) {
    missing[0] = max(all[i], params.limit) - params.limit;
  }
}
