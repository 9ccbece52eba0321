import Foundation

/// What went wrong, in words that name the file or tensor, what was expected and found, and what to do.
public struct LordbaError: Error, Equatable, CustomStringConvertible, LocalizedError {
  public let message: String

  public init(_ message: String) {
    self.message = message
  }

  public var description: String { message }
  public var errorDescription: String? { message }
}
