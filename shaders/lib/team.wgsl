// Register tiles for kernels in which a team of LANES neighbouring invocations owns sixteen rows and meets
// other rows, 4 * LANES of them at a time: a quad, or with the condition `octo` a subgroup of exactly eight.
//
// A Tile holds, for each owned row, four numbers of every lane: the row's products with the lane's four other
// rows, or four dimensions of a sum. Its matrices a, b, c, d are rows 0 .. 3, 4 .. 7, 8 .. 11 and 12 .. 15.
// Within a matrix of a quad, column j of lane q is row q ^ j: three swaps then show a lane what its
// neighbours loaded. An octo has plain order and broadcasts. On adapters that are emulated on a CPU a load
// costs twenty multiply-adds of vec4f, a swap or a broadcast one or two.

@if(octo) const LANES: u32 = 8u;
@else const LANES: u32 = 4u;
const TEAM_ROWS: u32 = 16u;

struct Tile { a: mat4x4f, b: mat4x4f, c: mat4x4f, d: mat4x4f }

// The owned rows of which a lane loads: of each LANES rows one. An octo needs only x and y.
fn loaded_rows(lane: u32) -> vec4u {
  return lane + vec4u(0u, 1u, 2u, 3u) * LANES;
}

// The rows that the columns of a Tile's matrix are, counted from the first of its four.
fn row_order(lane: u32) -> vec4u {
  @if(octo) return vec4u(0u, 1u, 2u, 3u);
  @else return vec4u(0u, 1u, 2u, 3u) ^ vec4u(lane);
}

// Every lane's vectors, one for each owned row, from what each lane has loaded.
@if(subgroups && octo) @diagnostic(off, subgroup_uniformity)
fn spread(x: vec4f, y: vec4f) -> Tile {
  return Tile(
    mat4x4f(subgroupBroadcast(x, 0u), subgroupBroadcast(x, 1u), subgroupBroadcast(x, 2u),
      subgroupBroadcast(x, 3u)),
    mat4x4f(subgroupBroadcast(x, 4u), subgroupBroadcast(x, 5u), subgroupBroadcast(x, 6u),
      subgroupBroadcast(x, 7u)),
    mat4x4f(subgroupBroadcast(y, 0u), subgroupBroadcast(y, 1u), subgroupBroadcast(y, 2u),
      subgroupBroadcast(y, 3u)),
    mat4x4f(subgroupBroadcast(y, 4u), subgroupBroadcast(y, 5u), subgroupBroadcast(y, 6u),
      subgroupBroadcast(y, 7u)),
  );
}
@if(subgroups && !octo)
fn spread(x: vec4f, y: vec4f, z: vec4f, w: vec4f) -> Tile {
  return Tile(quad_rows(x), quad_rows(y), quad_rows(z), quad_rows(w));
}

// Quads enter and leave loops as a whole, which the uniformity analysis cannot see.
@if(subgroups && !octo) @diagnostic(off, subgroup_uniformity)
fn quad_rows(x: vec4f) -> mat4x4f {
  return mat4x4f(x, quadSwapX(x), quadSwapY(x), quadSwapDiagonal(x));
}

// The team goes through the numbers of all lanes in LANES steps. At step i a lane has those of lane
// `source_lane`: an octo takes them from the tile as it was, a quad from the tile as the last step left it.
fn source_lane(lane: u32, i: u32) -> u32 {
  @if(octo) return i;
  @else return lane ^ i ^ (i >> 1u);
}
@if(subgroups && octo)
fn source_tile(x: Tile, i: u32) -> Tile {
  return Tile(of_lane(x.a, i), of_lane(x.b, i), of_lane(x.c, i), of_lane(x.d, i));
}
@if(subgroups && octo) @diagnostic(off, subgroup_uniformity)
fn of_lane(m: mat4x4f, i: u32) -> mat4x4f {
  return mat4x4f(subgroupShuffle(m[0], i), subgroupShuffle(m[1], i), subgroupShuffle(m[2], i),
    subgroupShuffle(m[3], i));
}
@if(subgroups && !octo)
fn next_tile(x: Tile, i: u32) -> Tile {
  return Tile(swapped(x.a, i), swapped(x.b, i), swapped(x.c, i), swapped(x.d, i));
}
@if(subgroups && !octo) @diagnostic(off, subgroup_uniformity)
fn swapped(m: mat4x4f, i: u32) -> mat4x4f {
  if ((i & 1u) == 0u) {
    return mat4x4f(quadSwapX(m[1]), quadSwapX(m[0]), quadSwapX(m[3]), quadSwapX(m[2]));
  }
  return mat4x4f(quadSwapY(m[2]), quadSwapY(m[3]), quadSwapY(m[0]), quadSwapY(m[1]));
}

// Component j belongs to column j of a Tile's matrix: the largest and the sum over the lanes of the team.
@if(subgroups) @diagnostic(off, subgroup_uniformity)
fn team_max(x: vec4f) -> vec4f {
  @if(octo) let pair = max(x, subgroupShuffleXor(x, 1u));
  @else let pair = max(x, quadSwapX(x).yxwz);
  @if(octo) let quad = max(pair, subgroupShuffleXor(pair, 2u));
  @else let quad = max(pair, quadSwapY(pair).zwxy);
  @if(octo) return max(quad, subgroupShuffleXor(quad, 4u));
  @else return quad;
}
@if(subgroups) @diagnostic(off, subgroup_uniformity)
fn team_sum(x: vec4f) -> vec4f {
  @if(octo) let pair = x + subgroupShuffleXor(x, 1u);
  @else let pair = x + quadSwapX(x).yxwz;
  @if(octo) let quad = pair + subgroupShuffleXor(pair, 2u);
  @else let quad = pair + quadSwapY(pair).zwxy;
  @if(octo) return quad + subgroupShuffleXor(quad, 4u);
  @else return quad;
}

// s + x y, where row r of the tile x has four factors for the columns of y.
fn tile_add(s: Tile, x: Tile, y: mat4x4f) -> Tile {
  return Tile(add_rows(s.a, x.a, y), add_rows(s.b, x.b, y), add_rows(s.c, x.c, y), add_rows(s.d, x.d, y));
}
fn add_rows(s: mat4x4f, x: mat4x4f, y: mat4x4f) -> mat4x4f {
  return mat4x4f(add_row(s[0], x[0], y), add_row(s[1], x[1], y), add_row(s[2], x[2], y),
    add_row(s[3], x[3], y));
}
fn add_row(s: vec4f, x: vec4f, y: mat4x4f) -> vec4f {
  return fma(vec4f(x.w), y[3], fma(vec4f(x.z), y[2], fma(vec4f(x.y), y[1], fma(vec4f(x.x), y[0], s))));
}

// Row r times factor r, by matrix.
fn tile_scale(x: Tile, f: mat4x4f) -> Tile {
  return Tile(scale_rows(x.a, f[0]), scale_rows(x.b, f[1]), scale_rows(x.c, f[2]), scale_rows(x.d, f[3]));
}
fn scale_rows(m: mat4x4f, f: vec4f) -> mat4x4f {
  return mat4x4f(m[0] * f.x, m[1] * f.y, m[2] * f.z, m[3] * f.w);
}

// Row i of the tile, and what belongs to it of one number per row.
fn tile_row(x: Tile, i: u32, lane: u32) -> vec4f {
  let low = select_matrix(x.a, x.b, (i & 4u) != 0u);
  let high = select_matrix(x.c, x.d, (i & 4u) != 0u);
  return column_of(select_matrix(low, high, i >= 8u), i, lane);
}
fn row_number(m: mat4x4f, i: u32, lane: u32) -> f32 {
  let by_place = transpose(m); // component r of column j: row 4 r + j of an octo
  let x = column_of(by_place, i, lane);
  return select(select(x.x, x.y, (i & 4u) != 0u), select(x.z, x.w, (i & 4u) != 0u), i >= 8u);
}
fn select_matrix(x: mat4x4f, y: mat4x4f, second: bool) -> mat4x4f {
  return mat4x4f(select(x[0], y[0], second), select(x[1], y[1], second), select(x[2], y[2], second),
    select(x[3], y[3], second));
}
fn column_of(m: mat4x4f, i: u32, lane: u32) -> vec4f {
  @if(octo) let j = i & 3u;
  @else let j = (i ^ lane) & 3u;
  return select(select(m[0], m[1], j == 1u), select(m[2], m[3], j == 3u), j >= 2u);
}
