/** The roundings of one projection: on every rank that holds it, and what ranks have to agree about. */
import { asOp, forRank } from "../gpu/lane.ts";
import { type Group, largestInGroup } from "../ops/collectives.ts";
import {
  FAKE_LAYOUTS, type FakeQuantizeOptions, fakeValues, largestMagnitude, type Magnitudes, padded_offsets,
  type Place, rotateColumns, type RowGroups, spreadOf,
} from "../ops/fake_quantize.ts";
import { noGrad, recorder } from "../ops/op.ts";
import type { Rounding, Summand } from "../ops/rounding.ts";
import { watch_gradient } from "../ops/watch_gradient.ts";
import type { Device } from "../tensor/device.ts";
import { scope } from "../tensor/scope.ts";
import { localsOf, onRank, perRank, shardedOf } from "../tensor/sharded.ts";
import type { Tensor } from "../tensor/tensor.ts";
import type { SharedScale } from "./active.ts";
import type { Operand, Products } from "./recipes.ts";

/** Of a projection: its numbers of random streams. */
const [ALONG, DOWN] = [0, 1] as const;
/** How many numbers every projection has. */
export const STREAMS_EACH = 2;

/** Scales from earlier updates, on one rank. */
export interface GivenScales {
  readonly magnitudes: Tensor;
  readonly scales: Tensor;
}

/** By what a rank's gradients draw random bits. */
export interface Drawing {
  /** u32 [4] with the seed and the number of the micro-batch, as it is being recorded. */
  readonly counter: () => Tensor;
  /** Tells the ranks apart whose rows are different ones of a micro-batch, but nobody's in particular. */
  readonly apart: number;
  /** Where its rows, and blocks of 16 rows, stand in the matrix of one rank; null: they are that. */
  readonly along: Place | null;
  readonly down: Place | null;
}

interface Source {
  readonly stream: number;
  readonly drawing: Drawing;
  /** Null: scales follow from the tensor itself. */
  readonly given: GivenScales | null;
  /** Of the input; the gradient has the next. */
  readonly slot: number;
  readonly learns: () => boolean;
}

/** What is known of a tensor before it is rounded. */
interface Seen {
  readonly plain: Magnitudes | null;
  readonly turned: { readonly rotated: Tensor; readonly own: Magnitudes } | null;
}

export class ProjectionRounding implements Rounding {
  readonly products: Products;
  readonly #source: Source;
  readonly #weights: Tensor[] = [];
  #takeInput: () => Seen | null = () => null;
  #takeGradient: () => Seen | null = () => null;

  constructor(products: Products, source: Source) {
    this.products = products;
    this.#source = source;
  }

  take(values: Tensor, place: 0 | 1): void {
    this.#weights[place] = values;
  }

  /** What is known of its input and of its gradient comes from there. */
  listen(input: () => Seen, gradient: () => Seen): void {
    this.#takeInput = input;
    this.#takeGradient = gradient;
  }

  forward(): Tensor {
    return this.#weights[0]!;
  }

  backward(): Tensor {
    return this.#weights[1] ?? this.#weights[0]!;
  }

  input(
    x: Tensor, keeps: boolean, groups: RowGroups | null,
  ): { forward: Tensor; kept: Summand | null } {
    const { fprop, wgrad } = this.products;
    const { along, down } = this.#round(
      x, fprop.x, keeps ? wgrad.x : null, groups, this.#source.slot, this.#takeInput());
    return { forward: along!, kept: down };
  }

  gradient(
    dy: Tensor, wants: { readonly x: boolean; readonly weight: boolean }, groups: RowGroups | null,
  ): { backward: Tensor | null; kept: Summand | null } {
    const { dgrad, wgrad } = this.products;
    const seen = this.#takeGradient();
    const { along, down } = this.#round(
      dy, wants.x ? dgrad.dy : null, wants.weight ? wgrad.dy : null, groups, this.#source.slot + 1, seen);
    release(seen);
    return { backward: along, kept: down };
  }

  /** Rows of x with blocks along them and with blocks down the columns, as far as they are wanted. */
  #round(
    x: Tensor, along: Operand | null, down: Operand | null, groups: RowGroups | null, slot: number,
    seen: Seen | null,
  ): { along: Tensor | null; down: Summand | null } {
    const { given: scales, learns } = this.#source;
    let given: FakeQuantizeOptions["given"];
    if (scales) {
      const { magnitudes, scales: of } = scales;
      const entries = magnitudes.shape[1]!;
      const isUsual = entries === spreadOf(x.device).partials;
      if (learns()) {
        largestMagnitude(x, { partial: magnitudes, first: slot * entries }, isUsual ? 0 : entries);
      }
      given = { scales: of, slot };
    }
    const { plain, turned } = seen ?? (scales ? NOTHING : measured(x, along, down, groups));
    const first = along && fakeValues(x, this.#options(along, "rows", given), plain);
    if (!down) return { along: first, down: null };
    const whole = FAKE_LAYOUTS[down.format].block === null;
    if (first && whole && JSON.stringify(along) === JSON.stringify(down)) {
      return { along: first, down: { tensor: first, offsets: null } };
    }
    const how = this.#options(down, "columns", given);
    const tensor = turned
      ? fakeValues(turned.rotated, how, turned.own)
      : fakeValues(x, { ...how, groups: whole ? null : groups }, plain);
    const block = FAKE_LAYOUTS[down.format].block ?? 1;
    const offsets = groups && !whole ? padded_offsets(groups.offsets, block) : null;
    return { along: first, down: { tensor, offsets } };
  }

  #options(
    { format, scale_rule, whole_scale, stochastic }: Operand, blocks: "rows" | "columns",
    given: FakeQuantizeOptions["given"],
  ): FakeQuantizeOptions {
    const { stream, drawing: { counter, apart, along, down } } = this.#source;
    const [own, place] = blocks === "rows" ? [ALONG, along] : [DOWN, down];
    return {
      format, blocks, scale_rule, whole_scale, given,
      random: stochastic ? { counter: counter(), stream: stream + own, apart, place } : undefined,
    };
  }
}

const NOTHING: Seen = { plain: null, turned: null };

/** @param entries of magnitudes; 0: as many as suit the adapter */
function measured(
  x: Tensor, along: Operand | null, down: Operand | null, groups: RowGroups | null, entries = 0,
): Seen {
  if (down?.hadamard) {
    const { plain, ...turned } = rotateColumns(x, groups, entries);
    return { plain, turned };
  }
  const isScaled = [along, down].some((operand) => operand && FAKE_LAYOUTS[operand.format].scaled);
  return { plain: isScaled ? largestMagnitude(x, null, entries) : null, turned: null };
}

/** The same with magnitudes of several ranks. */
function withMagnitudes({ plain, turned }: Seen, partial: Tensor): Seen {
  return {
    plain: plain && { ...plain, partial }, turned: turned && { ...turned, own: { ...turned.own, partial } },
  };
}

function retain(seen: Seen): Seen {
  seen.plain!.partial.retain();
  seen.turned?.rotated.retain();
  return seen;
}

function release(seen: Seen | null): void {
  seen?.plain?.partial.release();
  seen?.turned?.rotated.release();
}

/** Whether scales of inputs or gradients follow from the whole tensor. */
export function isScaledAsWhole({ fprop, dgrad, wgrad }: Products): boolean {
  return [fprop.x, dgrad.dy, wgrad.x, wgrad.dy].some(({ format }) => FAKE_LAYOUTS[format].scaled);
}

/** Entries of magnitudes that suit all of these devices; 0 where each may choose. */
export function commonEntries(devices: readonly Device[]): number {
  const partials = devices.map((device) => spreadOf(device).partials);
  return new Set(partials).size > 1 ? Math.min(...partials) : 0;
}

/**
 * Tensors that several ranks hold parts of, and their scales. An op runs for one rank after the other; so all
 * of them are measured before the first: the input before the product, and the gradient when it has come to
 * every rank, before the first goes on with it.
 */
export class SharedTensors implements SharedScale {
  readonly #ranks: readonly ProjectionRounding[];
  readonly #weight: Tensor;
  readonly #group: Group;
  readonly #entries: number;
  #inputs: Seen[] = [];
  /** Gradients that have come; from when the first is asked for with the magnitudes of all. */
  #gradients: (Seen | null)[];
  #isAgreed = false;

  constructor(ranks: readonly ProjectionRounding[], weight: Tensor, group: Group) {
    this.#ranks = ranks;
    this.#weight = weight;
    this.#group = group;
    this.#entries = commonEntries(localsOf(weight).map(({ device }) => device));
    this.#gradients = ranks.map(() => null);
    ranks.forEach((one, rank) => one.listen(() => this.#inputs[rank]!, () => this.#gradientOf(rank)));
  }

  input(x: Tensor, groups: RowGroups | null): void {
    const keeps = recorder() !== null && this.#weight.requiresGrad;
    const { fprop, wgrad } = this.#ranks[0]!.products;
    this.#inputs = noGrad(() => this.#agreed(localsOf(x).map((local, rank) => forRank(rank, () =>
      asOp("largest", () =>
        measured(local, fprop.x, keeps ? wgrad.x : null, onRank(groups, rank), this.#entries))))));
  }

  output(y: Tensor, groups: RowGroups | null): Tensor {
    const { dgrad, wgrad } = this.#ranks[0]!.products;
    const isTrained = this.#weight.requiresGrad;
    return watch_gradient(y, perRank(this.#ranks.map((_, rank) => ({
      sees: (dy: Tensor) => {
        const own = onRank(groups, rank);
        release(this.#gradients[rank]!);
        this.#gradients[rank] = retain(
          scope(() => measured(dy, dgrad.dy, isTrained ? wgrad.dy : null, own, this.#entries)));
        this.#isAgreed = false;
      },
    }))));
  }

  /** Gives back gradients that nobody asked for. */
  dispose(): void {
    for (const seen of this.#gradients) release(seen);
    this.#gradients = [];
  }

  #gradientOf(rank: number): Seen {
    if (!this.#isAgreed) {
      // Where a rank's gradient has not come there is none: what it has seen of others is zero.
      const some = this.#gradients.find((seen) => seen !== null)!;
      const before = this.#gradients;
      const all = before.map((seen, i) => seen ?? withMagnitudes(
        some, localsOf(this.#weight)[i]!.device.zeros(some.plain!.partial.shape, "u32")));
      const agreed = this.#agreed(all);
      this.#gradients = before.map((seen, i) => seen && retain(agreed[i]!));
      for (const seen of before) release(seen);
      this.#isAgreed = true;
    }
    const seen = this.#gradients[rank]!;
    this.#gradients[rank] = null;
    return seen;
  }

  #agreed(seen: readonly Seen[]): Seen[] {
    const [first] = seen;
    if (!first!.plain) return [...seen];
    const most = largestInGroup(shardedOf(seen.map(({ plain }) => plain!.partial)), this.#group);
    return seen.map((one, rank) => withMagnitudes(one, localsOf(most)[rank]!));
  }
}
