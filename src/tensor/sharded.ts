import { ShapeError, UsageError } from "./errors.ts";
import { Tensor } from "./tensor.ts";

/**
 * A value on several ranks: one tensor for each, in rank order, all of one shape and dtype, which are those
 * that it shows itself. Every op runs once per rank on it and gives another one; what passes between ranks is
 * a collective (`ops/collectives.ts`). It has no memory of its own: what reads or writes memory goes to
 * `locals`.
 */
export class Sharded extends Tensor {
  readonly locals: readonly Tensor[];

  /**
   * Keeps a reference of its own to every local tensor.
   * @throws ShapeError without a local tensor, or where they differ in shape or dtype.
   */
  constructor(locals: readonly Tensor[]) {
    const [first] = locals;
    if (!first) throw new ShapeError("A sharded tensor needs at least one local tensor, found none.");
    for (const { shape, dtype } of locals) {
      if (shape.join() === first.shape.join() && dtype === first.dtype) continue;
      throw new ShapeError(
        `The local tensors of a sharded one must agree: expected ${first.dtype} [${first.shape}], ` +
        `found ${dtype} [${shape}].`);
    }
    super(first.device, first.storage, first.byteOffset, first.shape, first.dtype);
    this.locals = [...locals];
    for (const local of locals) local.retain();
    const refuse = (): never => {
      throw new UsageError("A sharded tensor has no memory of its own; take one of its locals.");
    };
    Object.defineProperties(this, {
      storage: { get: refuse },
      requiresGrad: {
        get: () => this.locals.some((local) => local.requiresGrad),
        set: (wanted: boolean) => {
          for (const local of this.locals) local.requiresGrad = wanted;
        },
      },
      relu2Key: {
        get: () => null,
        set: (key: null) => {
          for (const local of this.locals) local.relu2Key = key;
        },
      },
    });
  }

  override reshape(shape: readonly number[]): Tensor {
    return this.#map((local) => local.reshape(shape));
  }

  override prefix(shape: readonly number[]): Tensor {
    return this.#map((local) => local.prefix(shape));
  }

  override range(first: number, shape: readonly number[]): Tensor {
    return this.#map((local) => local.range(first, shape));
  }

  /** @throws UsageError always: ranks may hold different values. */
  override read(): never {
    throw new UsageError("A sharded tensor holds a value per rank; read those of its locals.");
  }

  /** The same values on every rank. */
  override write(values: Float32Array | Int32Array | Uint32Array): void {
    for (const local of this.locals) local.write(values);
  }

  override copyFrom(other: Tensor): void {
    const others = localsOf(other);
    if (others.length !== this.locals.length) {
      throw new ShapeError(
        `copyFrom: expected a value on ${this.locals.length} ranks, found ${others.length}.`);
    }
    this.locals.forEach((local, rank) => local.copyFrom(others[rank]!));
  }

  override clear(): void {
    for (const local of this.locals) local.clear();
  }

  protected override free(): void {
    for (const local of this.locals) local.release();
  }

  #map(view: (local: Tensor) => Tensor): Tensor {
    return new Sharded(this.locals.map(view));
  }
}

/** The tensor of every rank; a plain tensor is that of the only one. */
export function localsOf(x: Tensor): readonly Tensor[] {
  return x instanceof Sharded ? x.locals : [x];
}

/** One value from those of all ranks; a single rank's stays as it is. */
export function shardedOf(locals: readonly Tensor[]): Tensor {
  return locals.length === 1 ? locals[0]! : new Sharded(locals);
}

class PerRank {
  readonly values: readonly unknown[];
  constructor(values: readonly unknown[]) {
    this.values = values;
  }
}

/** An argument of an op that differs from rank to rank, such as a rank's first row of a table. */
export function perRank<T>(values: readonly T[]): T {
  return values.length === 1 ? values[0]! : new PerRank(values) as T;
}

/** Ranks of the sharded tensors that a value holds, in arrays and plain objects too; 0 without any. */
export function ranksOf(value: unknown): number {
  if (value instanceof Sharded) return value.locals.length;
  if (value instanceof PerRank) return value.values.length;
  if (Array.isArray(value)) return typeof value[0] === "object" ? Math.max(0, ...value.map(ranksOf)) : 0;
  return isPlain(value) ? Math.max(0, ...Object.values(value).map(ranksOf)) : 0;
}

/** The same value with everything in it that differs from rank to rank replaced by what one of them has. */
export function onRank<T>(value: T, rank: number): T {
  if (value instanceof Sharded) return value.locals[rank] as T;
  if (value instanceof PerRank) return value.values[rank] as T;
  if (Array.isArray(value)) return value.map((item) => onRank(item, rank)) as T;
  if (!isPlain(value)) return value;
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, onRank(item, rank)])) as T;
}

function isPlain(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && Object.getPrototypeOf(value) === Object.prototype;
}
