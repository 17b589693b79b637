/** Rows that ranks send to each other, with counts that are known only when it happens. */
import { ndarray, type NdArray } from "../tensor/ndarray.ts";

/** Of 32 bits: no row. */
const NONE = 2 ** 32 - 1;

interface RowTables {
  readonly groups: number;
  readonly blocks: number;
  readonly copies: number;
  readonly own: number;
  readonly rows: number;
  readonly sends: number;
  readonly limit?: number;
}

/** What arrives for a block of groups, in order: by group, then sender, then the sender's order. */
function arrivals(all: NdArray, { groups, blocks }: RowTables, block: number) {
  const [senders, width] = all.shape as [number, number];
  const list: { group: number; sender: number; row: number }[] = [];
  for (let group = block * (groups / blocks); group < (block + 1) * (groups / blocks); group++) {
    for (let sender = 0; sender < senders; sender++) {
      const at = sender * width + group;
      for (let row = all.data[at]!; row < all.data[at + 1]!; row++) list.push({ group, sender, row });
    }
  }
  return list;
}

/**
 * [offsets of what arrives, splits, from, back, missing] of the rank `own`; all [senders, W] says where the
 * groups begin in every sender's rows.
 */
export function row_tables(all: NdArray, options: RowTables): NdArray[] {
  const { groups, blocks, copies, own, rows, sends, limit = rows } = options;
  const mine = Math.floor(own / copies);
  const per_block = groups / blocks;
  const list = arrivals(all, options, mine);
  const offsets = ndarray([per_block + 1], Float64Array.from({ length: per_block + 1 }, (_, g) =>
    Math.min(limit, list.filter(({ group }) => group < mine * per_block + g).length)));
  const splits = ndarray([blocks + all.shape[0]!]);
  for (const { sender } of list) splits.data[blocks + sender]! += 1;
  const from = ndarray([rows, 1], new Float64Array(rows).fill(NONE));
  list.slice(0, rows).forEach(({ sender, row }, i) => {
    if (row < sends) from.data[i] = sender * sends + row;
  });
  const back = ndarray([sends, copies], new Float64Array(sends * copies).fill(NONE));
  for (let block = 0; block < blocks; block++) {
    arrivals(all, options, block).forEach(({ sender, row }, place) => {
      if (sender !== own) return;
      splits.data[block]! += 1;
      if (place >= rows || row >= sends) return;
      for (let copy = 0; copy < copies; copy++) {
        back.data[row * copies + copy] = (block * copies + copy) * rows + place;
      }
    });
  }
  return [offsets, splits, from, back, ndarray([1], Float64Array.of(Math.max(0, list.length - rows)))];
}

/** [offsets, at most `rows`; what the last one loses]. */
export function limit_offsets(offsets: NdArray, rows: number): NdArray[] {
  const missing = Math.max(0, offsets.data.at(-1)! - rows);
  return [
    ndarray(offsets.shape, offsets.data.map((end) => Math.min(end, rows))),
    ndarray([1], Float64Array.of(missing)),
  ];
}

/** Tables, those of the way back, splits and rows of the ranks of a group. */
function partsOf(tensors: readonly NdArray[]) {
  const g = tensors.length / 4;
  return { g, tables: tensors.slice(0, g), xs: tensors.slice(3 * g) };
}

/** y_i[r] = the sum of the rows that table_i[r] names; of whole numbers it names one, or none: all ones. */
export function exchange_rows(options: { readonly integers?: boolean }, ...tensors: NdArray[]): NdArray[] {
  const { tables, xs } = partsOf(tensors);
  const [S, D] = xs[0]!.shape as [number, number];
  return tables.map(({ shape: [rows, per], data }) => {
    const y = ndarray([rows!, D]);
    for (let r = 0; r < rows!; r++) {
      for (let j = 0; j < per!; j++) {
        const entry = data[r * per! + j]!;
        for (let d = 0; d < D; d++) {
          if (entry !== NONE) y.data[r * D + d]! += xs[Math.floor(entry / S)]!.data[entry % S * D + d]!;
          else if (options.integers) y.data[r * D + d] = NONE;
        }
      }
    }
    return y;
  });
}

/** Every row's gradient goes to the rows that it is the sum of. */
export function exchange_rows_vjp(
  grads: readonly (NdArray | null)[], _options: object, ...tensors: NdArray[]
): (NdArray | null)[] {
  const { g, tables, xs } = partsOf(tensors);
  const [S, D] = xs[0]!.shape as [number, number];
  const dxs = xs.map(({ shape }) => ndarray(shape));
  tables.forEach(({ data, shape: [, per] }, rank) => {
    const dy = grads[rank];
    if (!dy) return;
    data.forEach((entry, i) => {
      if (entry === NONE) return;
      const at = Math.floor(i / per!) * D;
      for (let d = 0; d < D; d++) dxs[Math.floor(entry / S)]!.data[entry % S * D + d]! += dy.data[at + d]!;
    });
  });
  return [...Array.from({ length: 1 + 3 * g }, () => null), ...dxs];
}
