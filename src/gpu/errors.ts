/**
 * Errors that the GPU layer raises. Each message is one sentence naming the thing, what was expected and what
 * was found.
 */

/** Base of the errors below, for callers that treat them alike. */
export class GpuLayerError extends Error {}

/**
 * The device is gone: the driver reset it, the page or the process destroyed it. Nothing made on it can be
 * used again.
 */
export class DeviceLostError extends GpuLayerError {
  override readonly name = "DeviceLostError";
  readonly reason: string;
  constructor(reason: string, message: string) {
    super(`The GPU device was lost (${reason})${message ? `: ${message}` : "."}`);
    this.reason = reason;
  }
}

/** An allocation did not fit: over the pool's ceiling, over a device limit, or refused by the driver. */
export class OutOfMemoryError extends GpuLayerError {
  override readonly name = "OutOfMemoryError";
  readonly requestedBytes: number;
  readonly availableBytes: number;
  constructor(message: string, requestedBytes: number, availableBytes: number) {
    super(message);
    this.requestedBytes = requestedBytes;
    this.availableBytes = availableBytes;
  }
}

/**
 * A shader did not compile or a pipeline was refused. The message carries file, line and the linked source
 * around it.
 */
export class ShaderError extends GpuLayerError {
  override readonly name = "ShaderError";
}

/** The driver refused a command, or the caller used the GPU layer in a way that cannot work. */
export class GpuError extends GpuLayerError {
  override readonly name = "GpuError";
}

/** No adapter was found, or not the one asked for. */
export class AdapterError extends GpuLayerError {
  override readonly name = "AdapterError";
}
