/** The optimiser's state as files hold it: by parameter, whole, whatever layout it was kept in. */
import type { TensorEntry } from "../io/safetensors.ts";
import { MOMENT_BLOCK } from "../ops/adamw.ts";
import { broken } from "../parallel/mesh.ts";
import { bytesOfElements, type Elements, elementsOf, type MeshModel } from "../parallel/model.ts";
import type { Shard } from "../parallel/shards.ts";
import { bytesPerElement, type DType } from "../tensor/dtype.ts";
import { sizeOf } from "../tensor/ndarray.ts";
import { type AdamW, readState, type StateEntry, writeState } from "./optimizer.ts";

/** One tensor of the state, and where it lies. */
interface WholeState {
  readonly name: string;
  readonly dtype: DType;
  readonly shape: readonly number[];
  /** Null where one rank has it all. */
  readonly shard: Shard | null;
  readonly entries: readonly StateEntry[];
  /** Elements of the parameter that an element of this belongs to: those of a block, for a scale. */
  readonly unit: number;
}

/** All tensors of the state. Of those that two stages have, both. */
function wholeStates(mesh: MeshModel, optimizers: readonly AdamW[]): WholeState[] {
  const found = new Map<string, { entry: StateEntry; entries: StateEntry[] }>();
  for (const entry of optimizers.flatMap(({ state }) => state)) {
    const known = found.get(entry.name);
    if (known) known.entries.push(entry);
    else found.set(entry.name, { entry, entries: [entry] });
  }
  return [...found].map(([name, { entry: { dtype, shape }, entries }]) => {
    const { parameter, shard } = mesh.parameters.get(name.slice(name.indexOf(".") + 1))!;
    const unit = /^[mv]_scale\./.test(name) ? MOMENT_BLOCK : 1;
    const whole = unit === 1 ? parameter.shape : [Math.ceil(sizeOf(parameter.shape) / unit)];
    return { name, dtype, shape: shard ? whole : shape, shard, entries, unit };
  });
}

/** Every element so often: `size` elements in the end. */
function spread(values: Elements, unit: number, size: number): Elements {
  return unit === 1 ? values : Float32Array.from({ length: size }, (_, i) => values[Math.floor(i / unit)]!);
}

/** One of so many elements. */
function gathered(values: Elements, unit: number): Elements {
  return unit === 1 ? values : values.filter((_, i) => i % unit === 0);
}

/**
 * Whether every 64 neighbours that share a scale lie on one rank, under all layouts alike.
 * @throws UsageError with the parameter whose cut divides them
 */
export function checkMomentBlocks(mesh: MeshModel): void {
  for (const [name, { shard, parameter: { shape } }] of mesh.parameters) {
    for (const { axis, dim, sections, pieces } of shard?.cuts ?? []) {
      const inner = sizeOf(shape.slice(dim + 1));
      const runs = sections.map((extent) => (extent / pieces) * inner);
      const run = runs.find((length) => length % MOMENT_BLOCK !== 0);
      if (run === undefined || pieces === 1) continue;
      broken(
        "moments of 8 bits that share a scale lie on one rank",
        `pieces of ${name} of a multiple of ${MOMENT_BLOCK} elements, ` +
        `which ${axis} = ${mesh.layout[axis]} cuts`, `one of ${run}`);
    }
  }
}

/** What a checkpoint writes. */
export function stateEntries(mesh: MeshModel, optimizers: readonly AdamW[]): TensorEntry[] {
  return wholeStates(mesh, optimizers).map(({ name, dtype, shape, shard, entries, unit }) => ({
    name, dtype, shape,
    bytes: async () => {
      if (!shard) return readState(entries[0]!);
      // Ranks with the same piece may each have the state of a part of it.
      const pieces: Elements[] = [];
      const pieceOf = (index: number) => (shard.expert ? index : Math.floor(index / shard.copies));
      for (const entry of entries) {
        const piece = pieces[pieceOf(shard.indexOf(mesh.coordinates(entry.rank)))] ??= elementsOf(
          dtype, new Uint8Array(sizeOf(shard.shape) * bytesPerElement(dtype)));
        const values = elementsOf(dtype, await readState(entry));
        const size = Math.min(values.length * unit, piece.length - entry.first);
        piece.set(spread(values, unit, size), entry.first);
      }
      const whole = shard.join(Array.from({ length: shard.ranks }, (_, i) => pieces[pieceOf(i)]!));
      return bytesOfElements(gathered(whole, unit));
    },
  }));
}

/**
 * Puts a state where it belongs.
 * @param read the bytes of a tensor; checks dtype and shape
 */
export async function restoreState(
  mesh: MeshModel, optimizers: readonly AdamW[],
  read: (tensor: Pick<WholeState, "name" | "dtype" | "shape">) => Promise<Uint8Array>,
): Promise<void> {
  for (const { name, dtype, shape, shard, entries, unit } of wholeStates(mesh, optimizers)) {
    const bytes = await read({ name, dtype, shape });
    const whole = shard && spread(elementsOf(dtype, bytes.slice()), unit, sizeOf(shard.parameter.shape));
    for (const entry of entries) {
      const { rank, first, byteLength } = entry;
      const piece = shard && whole
        ? bytesOfElements(gathered(shard.slice(whole, mesh.coordinates(rank)), unit)) : bytes;
      const from = (first / unit) * bytesPerElement(dtype);
      writeState(entry, piece.subarray(from, from + byteLength));
    }
  }
}
