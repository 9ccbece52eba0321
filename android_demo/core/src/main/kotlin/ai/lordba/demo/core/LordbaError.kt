package ai.lordba.demo.core

/** Says which file, module or tensor is wrong, what was expected, what was found, and what to do. */
class LordbaError(
    message: String,
    cause: Throwable? = null,
) : Exception(message, cause)
