/**
 * How tokens reach their experts, and what became of them comes back.
 *
 * alltoall   every choice of a token is a row, sorted by expert, that goes to the rank of the expert; ranks
 *            that share an expert's hidden units then show each other what they got
 * allgather  every rank sees all tokens of the group and takes what its experts want
 * flex       a token goes once to every rank that has some of its experts, with their numbers and weights;
 *            there its results are added before they come back
 *
 * Buffers have room for the most rows that can come, T * min(K, experts of a rank) * ranks, or for the
 * division's budget; the counts stay on the GPU. Spec: the token dispatchers of Megatron Core.
 */
import { gatherFromGroup, type Group, reduceScatterInGroup } from "../ops/collectives.ts";
import { add } from "../ops/elementwise.ts";
import {
  type Exchange, limit_offsets, planExchange, returnRows, sendRows,
} from "../ops/exchange.ts";
import { moe_permute, moe_plan, type MoePlan, moe_unpermute } from "../ops/moe.ts";
import { keep_choices, type LimitOptions, moe_limit } from "../ops/moe_limit.ts";
import { moe_weigh } from "../ops/moe_weigh.ts";
import { localsOf, perRank, shardedOf } from "../tensor/sharded.ts";
import type { Tensor } from "../tensor/tensor.ts";
import type { ForwardContext, Overflow } from "./context.ts";
import { type Division, placesIn, sizeOfGroup } from "./division.ts";

/** Tokens with the experts that a router chose for them, on every rank. */
export interface Choices {
  /** (tokens, width) */
  readonly x: Tensor;
  /** (tokens, topk) */
  readonly weight: Tensor;
  /** (tokens, topk) u32, ascending expert numbers of all E. */
  readonly index: Tensor;
  /** All experts. */
  readonly E: number;
  /** What an expert takes of the tokens of a rank; null: all of them. */
  readonly limit: LimitOptions | null;
}

/** What the experts of a rank get to do. */
export interface Dispatched {
  /** Rows in expert order; with `permute` in the order of tokens. */
  readonly x: Tensor;
  /** u32 (own experts + 1) */
  readonly offsets: Tensor;
  readonly permute?: { readonly slot_token: Tensor; readonly token_slot: Tensor; readonly topk: number };
  /** Rows of results that there is room for. */
  readonly rows: number;
  /** Whether the offsets may end before them. */
  readonly spare: boolean;
  readonly exchanges: readonly Exchange[];
  /** Where there is a budget: u32 [1], rows beyond those that fit. With one above 0 the result is wrong. */
  readonly missing: readonly Missing[];
  /** (rows, width): every row times its weight */
  readonly weigh: (rows: Tensor) => Tensor;
  /**
   * (rows, width) -> (tokens, width), plus what `beside` gives, which is asked while rows travel; rows that
   * are not weighed yet are here.
   */
  readonly combine: (rows: Tensor, beside: () => Tensor | null, isWeighed: boolean) => Tensor;
}

type Border = NonNullable<ForwardContext["border"]>;
type Missing = Pick<Overflow, "rows" | "missing">;

/** @param border that of the context */
export function dispatch(choices: Choices, division: Division, border: Border = () => {}): Dispatched {
  const ranks = sizeOfGroup(division.ep) * sizeOfGroup(division.etp);
  if (ranks === 1) return alone(choices);
  const { dispatcher } = division;
  if (dispatcher === "alltoall") return byExpert(choices, division, border);
  return dispatcher === "flex" ? byRank(choices, division, border) : fromAll(choices, division, border);
}

/** The ranks that share all experts: `etp` within `ep`. */
export function expertGroup({ ep, etp }: Division): Group {
  if (sizeOfGroup(etp) === 1) return ep;
  if (sizeOfGroup(ep) === 1) return etp;
  const around = new Map(etp.members.flatMap((ranks) => ranks.map((rank) => [rank, ranks] as const)));
  const firsts = ep.members.filter((ranks) => around.get(ranks[0]!)![0] === ranks[0]);
  const members = firsts.map((ranks) => ranks.flatMap((rank) => around.get(rank)!));
  return { ...ep, name: "etp-ep", members };
}

/** Rows that a rank has room for: of `most` as many as the budget allows. */
function roomFor(most: number, { index }: Choices, { expert_budget, etp }: Division): number {
  if (expert_budget === undefined) return most;
  return Math.min(most, Math.ceil(expert_budget * index.size * sizeOfGroup(etp)));
}

function planOf({ weight, index, E, limit }: Choices): MoePlan {
  const plan = moe_plan(index, E);
  return limit ? moe_limit(plan, weight, limit) : plan;
}

/** The choices that are not dropped; of those that are the expert is nobody's. */
function keptOf({ weight, index, E, limit }: Choices): Tensor {
  if (!limit || limit.capacity === null) return index;
  const { capacity, policy = "probs" } = limit;
  return keep_choices(index, moe_limit(moe_plan(index, E), weight, { capacity, policy }));
}

/** Rows of an expert from one rank. */
function perExpert({ index, limit }: Choices): number {
  const { capacity = null, align = 1 } = limit ?? {};
  return Math.ceil((capacity ?? index.shape[0]!) / align) * align;
}

function alone(choices: Choices): Dispatched {
  const { x, weight, index } = choices;
  const topk = index.shape[1]!;
  const plan = planOf(choices);
  const { spare = false } = plan;
  return {
    // Slots without a choice may lie anywhere in a limited plan.
    ...(spare ? { x: moe_permute(x, plan, topk) } : { x, permute: { ...plan, topk } }),
    offsets: plan.offsets, rows: plan.slot_token.size, spare, exchanges: [], missing: [],
    weigh: (rows) => moe_weigh(rows, weight, plan),
    combine: (rows, beside, isWeighed) => moe_unpermute(rows, isWeighed ? topk : weight, plan, beside()),
  };
}

function byExpert(choices: Choices, division: Division, border: Border): Dispatched {
  const { x, weight, index, E } = choices;
  const [T, topk] = index.shape as [number, number];
  const [EP, ETP] = [sizeOfGroup(division.ep), sizeOfGroup(division.etp)];
  const plan = planOf(choices);
  const exchanges: Exchange[] = [];
  let offsets = plan.offsets;
  let rows = plan.slot_token.size;
  const own = E / EP;
  const most = EP * Math.min(rows, choices.limit ? own * perExpert(choices) : T * Math.min(topk, own));
  const room = roomFor(most * ETP, choices, division);
  if (EP > 1) {
    const sends = rows;
    rows = Math.min(most, room);
    // Where more is to come, what does not fit is missed there.
    const above = ETP > 1 ? most : rows;
    exchanges.push(planExchange(
      offsets, division.ep, { groups: E, blocks: EP, copies: 1, rows, sends, limit: above }));
    offsets = exchanges[0]!.offsets;
  }
  if (ETP > 1) {
    const sends = rows;
    rows = room;
    exchanges.push(planExchange(offsets, division.etp, { groups: own, blocks: 1, copies: ETP, rows, sends }));
    offsets = exchanges.at(-1)!.offsets;
  }
  const there = (value: Tensor) => exchanges.reduce(sendRows, value);
  const sorted = moe_permute(x, plan, topk);
  border("dispatch");
  const arrived = there(sorted);
  border("experts");
  return {
    x: arrived, offsets, rows, spare: true, exchanges,
    missing: room < most * ETP ? [{ rows: room, missing: exchanges.at(-1)!.missing }] : [],
    weigh: (y) => moe_weigh(y, there(moe_permute(weight.reshape([-1, 1]), plan, 1)), everyRow(y)),
    combine(y, beside, isWeighed) {
      border("combine");
      const back = exchanges.reduceRight(returnRows, y);
      const base = beside();
      border("before");
      return moe_unpermute(back, isWeighed ? topk : weight, plan, base);
    },
  };
}

/** The plan by which every row is a choice of its own. */
function everyRow(y: Tensor): MoePlan {
  return moe_plan(shardedOf(localsOf(y).map(({ device, shape }) => device.zeros([shape[0]!, 1], "u32"))), 1);
}

/** The part of the experts in tokens of the whole group, of which some may have none there. */
function experts(x: Tensor, weight: Tensor, index: Tensor, choices: Choices, division: Division) {
  const { E } = choices;
  const own = E / sizeOfGroup(division.ep);
  const [tokens, topk] = index.shape as [number, number];
  const most = tokens * Math.min(topk, own);
  const rows = roomFor(most, choices, division);
  const first = perRank(placesIn(division.ep).map((place) => place * own));
  const plan = moe_plan(index, own, { first, slots: rows });
  const [offsets, missing] = rows < most ? limit_offsets(plan.offsets, rows) : [plan.offsets];
  const limited = filledUp({ ...plan, offsets: offsets! }, weight, choices, division);
  const read = limited.slot_token === plan.slot_token
    ? { x, permute: { ...limited, topk } } : { x: moe_permute(x, limited, topk) };
  return {
    ...read, offsets: limited.offsets, rows: limited.slot_token.size, spare: true,
    missing: missing ? [{ rows, missing }] : [],
    weigh: (y: Tensor) => moe_weigh(y, weight, limited),
    combine: (y: Tensor, isWeighed: boolean) => moe_unpermute(y, isWeighed ? topk : weight, limited),
  };
}

/** The plan with the rows that a limit adds to those of tokens, of which none is dropped any more. */
function filledUp(plan: MoePlan, weight: Tensor, { limit }: Choices, { ep, etp }: Division): MoePlan {
  const { capacity = null, pad = false, align = 1 } = limit ?? {};
  if (!pad && align === 1) return plan;
  const all = pad ? capacity! * sizeOfGroup(ep) * sizeOfGroup(etp) : null;
  return moe_limit(plan, weight, { capacity: all, pad, align });
}

function fromAll(choices: Choices, division: Division, border: Border): Dispatched {
  const group = expertGroup(division);
  const { x, weight } = choices;
  const index = keptOf(choices);
  border("dispatch");
  const gathered = [
    gatherFromGroup(x, group, 0, true), gatherFromGroup(weight, group, 0, true),
    gatherFromGroup(index, group, 0, false),
  ] as const;
  border("experts");
  const all = experts(...gathered, choices, division);
  return {
    ...all, exchanges: [],
    combine(y, beside, isWeighed) {
      const part = all.combine(y, isWeighed);
      border("combine");
      const own = reduceScatterInGroup(part, group, 0);
      const base = beside();
      border("before");
      return base ? add(own, base) : own;
    },
  };
}

function byRank(choices: Choices, division: Division, border: Border): Dispatched {
  const { x, weight, E } = choices;
  const index = keptOf(choices);
  const [T, topk] = index.shape as [number, number];
  const [EP, ETP] = [sizeOfGroup(division.ep), sizeOfGroup(division.etp)];
  const sends = T * Math.min(topk, EP);
  const plan = moe_plan(index, EP, { block: E / EP, slots: sends });
  const rows = roomFor(T * EP * ETP, choices, division);
  const exchange = planExchange(
    plan.offsets, expertGroup(division), { groups: EP, blocks: EP, copies: ETP, rows, sends });
  const sorted = [x, weight, index].map((value) => moe_permute(value, plan, topk));
  border("dispatch");
  const [rowsOf, weights, indices] = sorted.map((value) => sendRows(value, exchange));
  border("experts");
  const here = experts(rowsOf!, weights!, indices!, choices, division);
  return {
    ...here, exchanges: [exchange],
    missing: [...(rows < T * EP * ETP ? [{ rows, missing: exchange.missing }] : []), ...here.missing],
    combine(y, beside, isWeighed) {
      const part = here.combine(y, isWeighed);
      border("combine");
      const back = returnRows(part, exchange);
      const base = beside();
      border("before");
      return moe_unpermute(back, topk, plan, base);
    },
  };
}
