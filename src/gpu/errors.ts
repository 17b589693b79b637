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
  override readonly name: string = "DeviceLostError";
  readonly reason: string;
  constructor(reason: string, message: string, options?: ErrorOptions) {
    super(`The GPU device was lost (${reason})${message ? `: ${message}` : "."}`, options);
    this.reason = reason;
  }
}

/**
 * One of several devices that exchange bytes is gone, and with it what all of them were doing: none of them
 * can be used again. The message names the rank, its adapter and where it was lost.
 */
export class RankLostError extends DeviceLostError {
  override readonly name: string = "RankLostError";
  /** Null where the device is no rank's. */
  readonly rank: number | null;
  /** Of the device that was lost: "lavapipe". */
  readonly adapter: string;
  /** What it was in the middle of: "while rank 1 waited for 64 bytes from it"; "" where nobody knows. */
  readonly where: string;

  constructor(rank: number | null, adapter: string, where: string, cause: Error) {
    const reason = cause instanceof DeviceLostError ? cause.reason : cause.name;
    super(reason, cause.message, { cause });
    const who = `${rank === null ? "A device" : `Rank ${rank}`} on ${adapter}`;
    this.message = `${who} was lost${where && ` ${where}`}: ${cause.message}`;
    this.rank = rank;
    this.adapter = adapter;
    this.where = where;
  }

  /** The same, with where in the work of the caller it was. */
  during(what: string): RankLostError {
    const where = this.where ? `${what}, ${this.where}` : what;
    return new RankLostError(this.rank, this.adapter, where, this.cause as Error);
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
