// What becomes of rows that found no place in buffers of limited size.
//
// keep_largest: kept[at] = max(kept[at], missing[0]), so that the worst of several passes stays
// withhold:     held[0] = -1, with which nothing is updated, where one of `count` numbers missing[i] is above
//               0; else gate[0]
//
// One invocation each.
struct Params {
  count: u32,
  at: u32,
}

@group(0) @binding(0) var<storage, read> missing: array<u32>;
@group(0) @binding(1) var<storage, read_write> kept: array<u32>;
@group(0) @binding(2) var<storage, read> gate: array<f32>;
@group(0) @binding(3) var<storage, read_write> held: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

@compute @workgroup_size(1)
fn keep_largest() {
  kept[params.at] = max(kept[params.at], missing[0]);
}

@compute @workgroup_size(1)
fn withhold() {
  var any = 0u;
  for (var i = 0u; i < params.count; i++) {
    any |= missing[i];
  }
  held[0] = select(gate[0], -1.0, any != 0u);
}
