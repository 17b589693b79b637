// Which rows and columns a tile of a product of x [M, K] with W^T computes, for a file that declares
// params.m, params.n, params.row_tiles and, with the condition `grouped`, tiles: row tile i is then
// (expert, first row, end row, 0) = tiles[4 i ..], and W has a matrix per expert.

// Rows row .. end, none of them where a tile is not one; columns from `column` on.
struct Place { expert: u32, row: u32, end: u32, column: u32 }

// Tile number `tile` of squares with `size` rows.
fn place_of(tile: u32, size: u32) -> Place {
  let across = (params.n + size - 1u) / size;
  let row_tile = tile / across;
  let column = tile % across * size;
  if (row_tile >= params.row_tiles) { return Place(0u, 0u, 0u, column); }
  @if(grouped) {
    let at = row_tile * 4u;
    return Place(tiles[at], tiles[at + 1u], tiles[at + 2u], column);
  }
  @else return Place(0u, row_tile * size, params.m, column);
}
