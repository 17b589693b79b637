import type { Device } from "./device.ts";
import { register } from "./scope.ts";
import type { Tensor } from "./tensor.ts";

/**
 * Number formats of block-quantised matrices: 32 neighbours along the last dimension share an f16 scale.
 *
 *   q8  signed codes of 8 bits, value = code * scale: 8.5 bits per value
 *   q4  codes of 4 bits, value = (code - 8) * scale: 4.5 bits per value
 */
export type BlockFormat = "q8" | "q4";

/** How a format lies in memory: shaders/lib/blocks.wgsl decodes it. */
export interface BlockLayout {
  /** Bits of one code. */
  readonly bits: number;
  /** Values that share a scale. */
  readonly block: number;
}

export const BLOCK_LAYOUTS: Readonly<Record<BlockFormat, BlockLayout>> = {
  q8: { bits: 8, block: 32 },
  q4: { bits: 4, block: 32 },
};

export function isBlockFormat(name: string): name is BlockFormat {
  return Object.hasOwn(BLOCK_LAYOUTS, name);
}

/** Words that hold the codes of `size` values. */
export function codeWords(size: number, format: BlockFormat): number {
  return (size * BLOCK_LAYOUTS[format].bits) / 32;
}

/**
 * A matrix [N, K], or a stack of them [E, N, K], whose values are packed codes with a scale per block.
 * Made by `quantize`; products, `embedding` and `dequantize` read it. Like a tensor it belongs to the scope
 * that made it, or to its maker outside of every scope.
 */
export class BlockTensor {
  readonly shape: readonly number[];
  readonly format: BlockFormat;
  /** u32 [..., K * bits / 32] */
  readonly codes: Tensor;
  /** f16 [..., K / block] */
  readonly scales: Tensor;
  /** Quantised weights are not trained. */
  readonly requiresGrad = false;
  #refs = 1;

  /** Internal: use `quantize`. Takes over one reference to each part, beside any that a scope holds. */
  constructor(shape: readonly number[], format: BlockFormat, codes: Tensor, scales: Tensor) {
    this.shape = [...shape];
    this.format = format;
    this.codes = codes;
    this.scales = scales;
    register(this);
  }

  get device(): Device {
    return this.codes.device;
  }

  /** Number of values. */
  get size(): number {
    return (this.codes.size * 32) / BLOCK_LAYOUTS[this.format].bits;
  }

  get byteLength(): number {
    return this.codes.byteLength + this.scales.byteLength;
  }

  retain(): this {
    this.#refs++;
    return this;
  }

  /** Drops one reference; the memory goes back to the pool with the last. */
  release(): void {
    if (--this.#refs === 0) {
      this.codes.release();
      this.scales.release();
    }
    if (this.#refs < 0) {
      throw new Error(`A block tensor [${this.shape}] was released more often than it was retained.`);
    }
  }

  /** Gives up the owner's reference, for tensors that no scope owns (parameters). */
  dispose(): void {
    this.release();
  }
}
