/** Reverse-mode differentiation over recorded ops. */
import { asBackward } from "../gpu/lane.ts";
import { accumulate as addTo, add } from "../ops/elementwise.ts";
import { type Destinations, noGrad, recordOps, type OpRecord } from "../ops/op.ts";
import { scope } from "../tensor/scope.ts";
import type { Tensor } from "../tensor/tensor.ts";

/** Gradients by `Tensor.key`. Their holder frees them. */
export type GradientMap = Map<number, Tensor>;

/** A record of ops in the order they ran, good for one walk backwards. */
export class Tape {
  #records: OpRecord[] = [];

  /** Runs `body` and records its differentiable ops. */
  run<T>(body: () => T): T {
    return recordOps((record) => this.#records.push(record), body);
  }

  /** Number of recorded ops. */
  get length(): number {
    return this.#records.length;
  }

  /**
   * Walks back from `outputs` with the gradients `seeds` (for a scalar loss: a tensor of one element, 1).
   * @param places where the gradients of leaves are put, by the leaf's key; elsewhere those of other leaves
   * @returns the gradients of all leaves that require one and were reached. The tape is empty afterwards.
   */
  backward(outputs: readonly Tensor[], seeds: readonly Tensor[], places?: GradientMap): GradientMap {
    return this.walk(outputs, seeds, places).end();
  }

  /** The same walk, step by step. */
  walk(outputs: readonly Tensor[], seeds: readonly Tensor[], places?: GradientMap): Walk {
    return new Walk(this.#records, outputs, seeds, places);
  }

  /** Forgets everything recorded without walking back. */
  dispose(): void {
    for (const record of this.#records.splice(0)) record.release();
  }
}

/** A walk back over a tape that stops between ops and goes on. Whoever gives up half-way disposes of both. */
export class Walk {
  readonly #records: OpRecord[];
  readonly #gradients: GradientMap = new Map();
  readonly #places: GradientMap | undefined;
  readonly #produced: ReadonlySet<number>;
  /** Ops whose weights have no gradient yet, with what these come from. */
  readonly #postponed: Postponed[] = [];

  constructor(
    records: OpRecord[], outputs: readonly Tensor[], seeds: readonly Tensor[], places?: GradientMap,
  ) {
    this.#records = records;
    this.#places = places;
    this.#produced = new Set(records.flatMap((record) => record.outputs.map((output) => output.key)));
    this.#guarded(() =>
      outputs.forEach((output, i) => accumulate(this.#gradients, output.key, seeds[i]!.retain())));
  }

  /**
   * Goes back until so many ops are left.
   * @param postpone leaves the gradients of weights to `weights`, where an op has them apart
   */
  to(length: number, postpone = false): void {
    this.#guarded(() => {
      while (this.#records.length > length) {
        const record = this.#records.pop()!;
        const later = postpone ? record.weights.filter((argument) => this.#isLeaf(record, argument)) : [];
        asBackward(record.lane, () => this.#back(record, later));
      }
    });
  }

  /** Computes the gradients that were postponed, in the order of the walk. */
  weights(): void {
    this.#guarded(() => {
      for (let next = this.#postponed.shift(); next; next = this.#postponed.shift()) {
        const { record, incoming, later } = next;
        asBackward(record.lane, () => this.#give(record, incoming, (argument) => later.includes(argument)));
      }
    });
  }

  /** Goes back to the beginning. @returns the gradients of all leaves */
  end(): GradientMap {
    this.to(0);
    this.weights();
    for (const [key, gradient] of this.#gradients) {
      if (!this.#produced.has(key)) continue;
      gradient.release(); // an output nobody asked about
      this.#gradients.delete(key);
    }
    return this.#gradients;
  }

  /** Gives back the gradients so far. */
  dispose(): void {
    for (const { record, incoming } of this.#postponed.splice(0)) free(record, incoming);
    for (const gradient of this.#gradients.values()) gradient.release();
    this.#gradients.clear();
  }

  #guarded(body: () => void): void {
    try {
      body();
    } catch (error) {
      this.dispose();
      for (const record of this.#records.splice(0)) record.release();
      throw error;
    }
  }

  #isLeaf({ inputs }: OpRecord, argument: number): boolean {
    return inputs.some((input) => input.argument === argument && !this.#produced.has(input.key));
  }

  /** Turns the gradients of one op's outputs into those of its inputs, of some of them later. */
  #back(record: OpRecord, later: readonly number[]): void {
    const incoming = record.outputs.map(({ key }) => {
      const gradient = this.#gradients.get(key) ?? null;
      this.#gradients.delete(key);
      return gradient;
    });
    if (incoming.every((gradient) => gradient === null)) record.release();
    else if (later.length === 0) this.#give(record, incoming);
    else {
      this.#postponed.push({ record, incoming, later });
      this.#add(record, incoming, (argument) => !later.includes(argument));
    }
  }

  /** As `#add`, and frees what the op saved. */
  #give(
    record: OpRecord, incoming: readonly (Tensor | null)[], only?: (argument: number) => boolean,
  ): void {
    try {
      this.#add(record, incoming, only);
    } finally {
      free(record, incoming);
    }
  }

  #add(
    record: OpRecord, incoming: readonly (Tensor | null)[], only?: (argument: number) => boolean,
  ): void {
    const [gradients, places] = [this.#gradients, this.#places];
    scope(() => {
      const shaped = incoming.map((gradient, i) => gradient && gradient.reshape(record.outputs[i]!.shape));
      const added = new Map<number, number>(); // by key: the argument whose gradient is a sum already
      const results = record.backward(shaped, destinations(record, gradients, added, places), only);
      for (const [key, argument] of added) {
        gradients.get(key)!.release();
        gradients.set(key, results[argument]!.retain());
      }
      for (const { key, argument } of record.inputs) {
        const result = results[argument];
        if (result && added.get(key) !== argument) {
          accumulate(gradients, key, result.retain(), places?.get(key));
        }
      }
    });
  }
}

interface Postponed {
  readonly record: OpRecord;
  /** Gradients of the outputs. */
  readonly incoming: readonly (Tensor | null)[];
  /** Arguments whose gradients are due. */
  readonly later: readonly number[];
}

function free(record: OpRecord, incoming: readonly (Tensor | null)[]): void {
  for (const gradient of incoming) gradient?.release();
  record.release();
}

function destinations(
  { inputs }: OpRecord, gradients: GradientMap, added: Map<number, number>, places?: GradientMap,
): Destinations {
  const keyOf = (i: number) => inputs.find(({ argument }) => argument === i)?.key ?? 0; // no key is 0
  return {
    empty(i, like) {
      const key = keyOf(i);
      const place = gradients.has(key) ? undefined : places?.get(key);
      const isFree = place && inputs.every((input) => input.key !== key || input.argument === i);
      return isFree ? place.reshape(like.shape) : like.device.empty(like.shape);
    },
    soFar(i) {
      const key = keyOf(i);
      const sum = places?.has(key) || added.has(key) ? undefined : gradients.get(key);
      if (sum) added.set(key, i);
      return sum ?? null;
    },
  };
}

/** Adds to the gradient under `key`, in its place if it has one; takes over the caller's reference. */
function accumulate(gradients: GradientMap, key: number, gradient: Tensor, place?: Tensor): void {
  const existing = gradients.get(key);
  if (place) {
    if (!existing) gradients.set(key, place.retain());
    try {
      const isThere = gradient.storage === place.storage && gradient.byteOffset === place.byteOffset;
      if (!existing && !isThere) place.copyFrom(gradient);
      else if (existing) scope(() => noGrad(() => addTo(place, gradient.reshape(place.shape))));
    } finally {
      gradient.release();
    }
    return;
  }
  if (!existing) {
    gradients.set(key, gradient);
    return;
  }
  try {
    scope(() => {
      const sum = noGrad(() => add(existing.reshape([existing.size]), gradient.reshape([gradient.size])));
      gradients.set(key, sum.retain());
    });
    existing.release();
  } finally {
    gradient.release();
  }
}
