import { expect, vi } from "vitest";
import { OutOfMemoryError } from "../../src/gpu/errors.ts";
import type { Device } from "../../src/tensor/device.ts";

/**
 * Runs `work` again and again, with an allocation made to fail each time: the first, then the one `stride`
 * later, until there are none left and it succeeds. Every failure must be an OutOfMemoryError that leaves no
 * memory behind.
 *
 * @returns the number of failures
 */
export async function failEveryAllocation(
  device: Device, work: () => void | Promise<void>, stride = 1,
): Promise<number> {
  const { pool } = device;
  const allocate = pool.allocate.bind(pool);
  const before = pool.liveBytes;
  for (let failures = 0; ; failures++) {
    let left = failures * stride;
    let failed = false;
    const spy = vi.spyOn(pool, "allocate").mockImplementation((bytes) => {
      if (left-- > 0) return allocate(bytes);
      failed = true;
      throw new OutOfMemoryError("This allocation was made to fail.", bytes, 0);
    });
    let error: unknown = null;
    try {
      await work();
    } catch (thrown) {
      error = thrown;
    } finally {
      spy.mockRestore();
    }
    const which = `failure of allocation ${failures * stride}`;
    if (failed || error) expect(error, which).toBeInstanceOf(OutOfMemoryError);
    expect(pool.liveBytes, `bytes left by the ${which}`).toBe(before);
    expect(device.failure).toBeNull();
    if (!failed) return failures;
  }
}
