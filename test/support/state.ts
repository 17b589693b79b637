import { Tensor } from "../../src/tensor/tensor.ts";
import { readState, type StateEntry } from "../../src/train/optimizer.ts";

/** The bytes of a tensor, or of a part of an optimiser's state, in arrays of their own. */
export async function bitsOf(x: Tensor | StateEntry): Promise<Uint8Array<ArrayBuffer>> {
  if (x instanceof Tensor) return new Uint8Array(await x.device.readBytes(x));
  return Uint8Array.from(await readState(x));
}
