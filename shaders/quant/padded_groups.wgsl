// Where groups of rows begin once each is filled up to a multiple: padded[e] = sum over the groups before e
// of the smallest multiple of params.multiple that holds their rows. offsets, padded u32 [groups + 1]. One
// invocation walks the groups.

struct Params { groups: u32, multiple: u32 }

@group(0) @binding(0) var<storage, read> offsets: array<u32>;
@group(0) @binding(1) var<storage, read_write> padded: array<u32>;
@group(1) @binding(0) var<uniform> params: Params;

@compute @workgroup_size(1)
fn padded_groups() {
  var at = 0u;
  padded[0] = at;
  for (var e = 0u; e < params.groups; e++) {
    let rows = offsets[e + 1u] - offsets[e];
    at += (rows + params.multiple - 1u) / params.multiple * params.multiple;
    padded[e + 1u] = at;
  }
}
