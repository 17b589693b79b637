/** The optimiser's state as files hold it: by parameter, whole, whatever layout it was kept in. */
import type { TensorEntry } from "../io/safetensors.ts";
import { bytesOfElements, type Elements, elementsOf, type MeshModel } from "../parallel/model.ts";
import type { Shard } from "../parallel/shards.ts";
import { bytesPerElement, type DType } from "../tensor/dtype.ts";
import { sizeOf } from "../tensor/ndarray.ts";
import type { AdamW, StateEntry } from "./optimizer.ts";

/** One tensor of the state, and where it lies. */
interface WholeState {
  readonly name: string;
  readonly dtype: DType;
  readonly shape: readonly number[];
  /** Null where one rank has it all. */
  readonly shard: Shard | null;
  readonly entries: readonly StateEntry[];
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
    return { name, dtype, shape: shard ? parameter.shape : shape, shard, entries };
  });
}

/** What a checkpoint writes. */
export function stateEntries(mesh: MeshModel, optimizers: readonly AdamW[]): TensorEntry[] {
  return wholeStates(mesh, optimizers).map(({ name, dtype, shape, shard, entries }) => ({
    name, dtype, shape,
    bytes: async () => {
      if (!shard) return bytesOfEntry(entries[0]!);
      // Ranks with the same piece may each have the state of a part of it.
      const pieces: Elements[] = [];
      const pieceOf = (index: number) => (shard.expert ? index : Math.floor(index / shard.copies));
      for (const entry of entries) {
        const piece = pieces[pieceOf(shard.indexOf(mesh.coordinates(entry.rank)))] ??= elementsOf(
          dtype, new Uint8Array(sizeOf(shard.shape) * bytesPerElement(dtype)));
        piece.set(elementsOf(dtype, await bytesOfEntry(entry)), entry.first);
      }
      return bytesOfElements(shard.join(Array.from({ length: shard.ranks }, (_, i) => pieces[pieceOf(i)]!)));
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
  for (const { name, dtype, shape, shard, entries } of wholeStates(mesh, optimizers)) {
    const bytes = await read({ name, dtype, shape });
    for (const { rank, first, device, storage, byteOffset, byteLength } of entries) {
      const piece = shard
        ? bytesOfElements(shard.slice(elementsOf(dtype, bytes.slice()), mesh.coordinates(rank))) : bytes;
      const from = first * bytesPerElement(dtype);
      device.stream.write(storage, byteOffset, piece.subarray(from, from + byteLength));
    }
  }
}

async function bytesOfEntry(entry: StateEntry): Promise<Uint8Array> {
  return new Uint8Array(await entry.device.readBytes(entry));
}
