/**
 * Rows that pass between ranks in numbers which the GPU alone knows: of every group of rows (an expert's, or
 * those for a destination) a rank sends its own to the ranks that the group belongs to. Buffers have room for
 * the most there can be, or for a budget of rows; what finds no place is counted.
 */
import { launch } from "../kernel/launch.ts";
import { check } from "../tensor/check.ts";
import { perRank } from "../tensor/sharded.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { onArrival } from "../tensor/transfer.ts";
import {
  type Algorithm, announce, type Call, circulated, type CollectiveKind, type CountedRows, forEachGroup,
  gatherFromGroup, type Group, whole,
} from "./collectives.ts";
import { defineOp } from "./op.ts";

const WG = 64;
const INPUTS = 6;

/** Who sends what to whom: block b of the groups belongs to the ranks b * copies .. of the communication. */
export interface RowTableOptions {
  /** Groups of rows, a multiple of `blocks`. */
  readonly groups: number;
  readonly blocks: number;
  readonly copies: number;
  /** Number of this rank among those that send. */
  readonly own: number;
  /** Rows that a rank has room for, of those that arrive and of those that it sends. */
  readonly rows: number;
  readonly sends: number;
  /** Upper bound of the offsets; default: `rows`. */
  readonly limit?: number;
}

/**
 * Tables of an exchange of rows, for one rank. What arrives lies by group, then sender, then in the sender's
 * order.
 *
 * @param all  u32 [senders, groups + 1 or more]: where the groups begin in the rows of every sender
 * @returns [offsets u32 [groups / blocks + 1], where the groups begin in what arrives, at most `limit`;
 *   splits u32 [blocks + senders]: rows sent to every block, then rows that arrive from every sender;
 *   from u32 [rows, 1]: sender * sends + row of what arrives; back u32 [sends, copies]: rank * rows + row
 *   there of what is sent, both 2^32 - 1 where there is no such row or place; missing u32 [1]: rows without
 *   a place]
 * @throws ShapeError for offsets of other groups or a block that no rank has
 */
export const row_tables = defineOp({
  name: "row_tables",
  forward(_ctx, all: Tensor, options: RowTableOptions): Tensor[] {
    const { groups, blocks, copies, own, rows, sends, limit = rows } = options;
    check(all.shape.length === 2 && all.shape[1]! > groups, "row_tables", "all",
      `[senders, above ${groups}]`, all);
    check(groups % blocks === 0, "row_tables", "groups", `a multiple of ${blocks} blocks`, groups);
    const [sources, width] = all.shape as [number, number];
    check(blocks * copies === sources && own < sources, "row_tables", "all", `[${blocks * copies}, W]`, all);
    const { device } = all;
    const per_block = groups / blocks;
    const empty = (...shape: number[]) => device.empty(shape, "u32");
    const starts = empty(per_block * sources + 1);
    const [there, bases] = [empty(groups), empty(blocks)];
    const [offsets, splits, missing] = [empty(per_block + 1), empty(blocks + sources), empty(1)];
    const [from_table, to_table] = [empty(rows, 1), empty(sends, copies)];
    const params = {
      sources, width, groups, blocks, copies, own, block: Math.floor(own / copies), rows, sends, limit,
    };
    launch("comm/row_tables", {
      entry: "scan", bind: { all, starts, there, bases, offsets, splits, missing }, params,
      constants: { WG }, workgroups: [1],
    });
    launch("comm/row_tables", {
      entry: "tables", bind: { all, starts, there, from_table, to_table }, params, constants: { WG },
      workgroups: [Math.ceil(Math.max(rows, sends) / WG)],
    });
    return [offsets, splits, from_table, to_table, missing];
  },
});

/**
 * Offsets of groups that have room for so many rows: [offsets, at most `rows`; missing u32 [1], rows without
 * a place].
 *
 * @param offsets  u32 [groups + 1]
 * @throws ShapeError for another rank
 */
export const limit_offsets = defineOp({
  name: "limit_offsets",
  forward(_ctx, offsets: Tensor, rows: number): Tensor[] {
    check(
      offsets.shape.length === 1 && offsets.size > 0, "limit_offsets", "offsets", "[groups + 1]", offsets);
    const limited = offsets.device.empty(offsets.shape, "u32");
    const missing = offsets.device.empty([1], "u32");
    launch("comm/row_tables", {
      entry: "limited", bind: { all: offsets, offsets: limited, missing },
      params: {
        sources: 1, width: offsets.size, groups: 1, blocks: 1, copies: 1, own: 0, block: 0, rows, sends: 0,
        limit: rows,
      },
      constants: { WG }, workgroups: [Math.ceil(offsets.size / WG)],
    });
    return [limited, missing];
  },
});

export interface ExchangeRowsOptions extends Call {
  readonly kind: CollectiveKind;
  /** What the way back is. */
  readonly backward_kind: CollectiveKind;
  readonly blocks: number;
  readonly copies: number;
  /** Rows that a rank sends at most, before they are copied. */
  readonly sends: number;
}

/**
 * y_i[r] = the sum of the rows of all xs that table_i names, for every rank i. Between devices whole buffers
 * travel: how many rows of them count, nobody knows who records it.
 */
function rowsOf(tables: readonly Tensor[], all: readonly Tensor[], algorithm: Algorithm): Tensor[] {
  const [stride, D] = all[0]!.shape as [number, number];
  const isWide = D % 4 === 0;
  const cols = isWide ? D / 4 : D;
  const here = circulated(all, algorithm);
  return tables.map((table, rank) => {
    const rows = table.shape[0]!;
    const xs = here[rank]!;
    const { device, dtype } = xs[rank]!;
    const y = device.empty([rows, D], dtype);
    const parts = Math.max(1, Math.ceil(cols / (device.info.isSoftware ? 16 : 4)));
    const pick = (first: number) => {
      const inputs = xs.slice(first, first + INPUTS);
      const at = (n: number) => inputs[n] ?? inputs[0]!;
      launch("comm/rows", {
        bind: { x0: at(0), x1: at(1), x2: at(2), x3: at(3), x4: at(4), x5: at(5), table, y },
        params: {
          rows, cols, parts, per: table.size / Math.max(rows, 1), stride: Math.max(stride, 1), first,
          inputs: inputs.length,
        },
        constants: { WG },
        conditions: [
          ...isWide ? ["vec4" as const] : [], ...first > 0 ? ["more" as const] : [],
          ...dtype === "f32" ? [] : ["integers" as const],
        ],
        workgroups: [cols === 0 ? 0 : Math.ceil((rows * parts) / WG)],
      });
    };
    const record = () => {
      for (let first = 0; first < xs.length; first += INPUTS) pick(first);
    };
    if (all.every((x) => x.device === device)) record();
    else onArrival(y, all.filter((x) => x.device === device), [table, ...xs], record);
    return y;
  });
}

/** Rows that the ranks of a group send to each other, by the counts of `row_tables`. */
function countedRows(
  counts: readonly Tensor[], blocks: number, copies: number, row_bytes: number,
): CountedRows {
  return {
    counts,
    sent: (values) => values.map((splits, rank) => {
      const own = Math.floor(rank / copies);
      let rows = 0;
      for (let b = 0; b < blocks; b++) rows += splits[b]! * (b === own ? copies - 1 : copies);
      return row_bytes * rows;
    }),
  };
}

interface SavedExchange {
  readonly options: ExchangeRowsOptions;
  readonly back: readonly Tensor[];
  readonly splits: readonly Tensor[];
  readonly shape: readonly number[];
  readonly rows: number;
}

/**
 * The collective itself, of one group: y_i[r] = the sum of the rows that table_i[r] names, rank * S + row of
 * the xs [S, D], in this order. After the options: the ranks' tables u32 [R, n], the tables of the way back
 * u32 [S, m], by which gradients travel, the splits of `row_tables`, and the xs. f32; or u32 for n = 1 and
 * without gradients: a row of nobody is then 2^32 - 1.
 */
export const exchange_rows = defineOp({
  name: "exchange_rows",
  forward(ctx, options: ExchangeRowsOptions, ...tensors: Tensor[]): Tensor[] {
    const g = options.ranks.length;
    check(tensors.length === 4 * g, "exchange_rows", "tensors", `4 for each of ${g} ranks`, tensors.length);
    const [tables, back, splits, xs] =
      [0, 1, 2, 3].map((i) => tensors.slice(i * g, (i + 1) * g)) as [Tensor[], Tensor[], Tensor[], Tensor[]];
    const { shape } = xs[0]!;
    for (const x of xs) {
      check(x.shape.length === 2 && x.shape.join() === shape.join(), "exchange_rows", "x",
        `[S, D] on every rank, as [${shape.join(", ")}]`, x);
    }
    for (const table of back) {
      check(table.shape[0] === shape[0], "exchange_rows", "back", `[${shape[0]}, m]`, table);
    }
    const saved = { options, back, splits, shape, rows: tables[0]!.shape[0]! };
    say(saved, xs, false);
    ctx.save(saved);
    return rowsOf(tables, xs, options.algorithm);
  },
  backward(saved: SavedExchange, grads) {
    const { options, back } = saved;
    const g = options.ranks.length;
    const some = grads.find((grad) => grad !== null);
    if (!some) return [];
    const dys = whole(grads, back.map(({ device }) => device));
    say(saved, dys, true);
    return [...Array.from({ length: 1 + 3 * g }, () => null), ...rowsOf(back, dys, options.algorithm)];
  },
});

function say({ options, splits }: SavedExchange, xs: readonly Tensor[], backward: boolean): void {
  const { kind, backward_kind, blocks, copies, sends } = options;
  const row_bytes = 4 * xs[0]!.shape[1]!;
  // At most every row goes to others: with one block alone they are in it, and the sender too.
  const others = blocks > 1 ? copies : copies - 1;
  announce(backward ? backward_kind : kind, options, xs, xs.map(() => sends * others * row_bytes), backward,
    countedRows(splits, blocks, copies, row_bytes));
}

/** An exchange that is planned: values on all ranks of a stage, as `row_tables` gives them. */
export interface Exchange {
  readonly group: Group;
  readonly blocks: number;
  readonly copies: number;
  readonly sends: number;
  readonly offsets: Tensor;
  readonly splits: Tensor;
  readonly from: Tensor;
  readonly back: Tensor;
  readonly missing: Tensor;
}

/**
 * Plans an exchange in a group of blocks * copies ranks, copies fastest. The counts pass between the ranks.
 *
 * @param offsets  u32 [groups + 1 or more]: where the groups begin in the rows of a rank
 */
export function planExchange(
  offsets: Tensor, group: Group, options: Omit<RowTableOptions, "own">,
): Exchange {
  const all = gatherFromGroup(offsets.reshape([1, offsets.size]), group, 0, false);
  const own: number[] = [];
  for (const ranks of group.members) ranks.forEach((rank, place) => (own[rank] = place));
  const [starts, splits, from, back, missing] = row_tables(all, { ...options, own: perRank(own) });
  const { blocks, copies, sends } = options;
  return {
    group, blocks, copies, sends, offsets: starts!, splits: splits!, from: from!, back: back!,
    missing: missing!,
  };
}

/** x [sends, D] to the ranks that its rows belong to: [rows, D]. */
export function sendRows(x: Tensor, exchange: Exchange): Tensor {
  const kind = exchange.blocks > 1 ? "all_to_all" : "all_gather";
  const backward_kind = exchange.blocks > 1 ? "all_to_all" : "reduce_scatter";
  return exchanged(x, exchange, exchange.from, exchange.back, kind, backward_kind);
}

/** y [rows, D] back to where the rows came from: [sends, D], the sum of what the copies became. */
export function returnRows(y: Tensor, exchange: Exchange): Tensor {
  const kind = exchange.blocks > 1 ? "all_to_all" : "reduce_scatter";
  const backward_kind = exchange.blocks > 1 ? "all_to_all" : "all_gather";
  return exchanged(y, exchange, exchange.back, exchange.from, kind, backward_kind);
}

function exchanged(
  x: Tensor, { group, blocks, copies, sends, splits }: Exchange, table: Tensor, back: Tensor,
  kind: CollectiveKind, backward_kind: CollectiveKind,
): Tensor {
  return forEachGroup([table, back, splits, x], group, (call, locals) =>
    exchange_rows({ ...call, kind, backward_kind, blocks, copies, sends }, ...locals.flat()));
}
