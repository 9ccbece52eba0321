// The part of ExecuTorch's Swift interface that the app calls, as its package declares it: for checking types on Linux.
import Foundation

public enum DataType: Int, Sendable { case byte, char, short, int, long, half, float, double }

public enum ShapeDynamism: UInt8, Sendable { case `static`, dynamicBound, dynamicUnbound }

public class AnyTensor: NSObject, ValueConvertible {
  public convenience init(
    data: Data, shape: [Int], strides: [Int] = [], dimensionOrder: [Int] = [], dataType: DataType,
    shapeDynamism: ShapeDynamism = .dynamicBound
  ) { fatalError() }
  public var shape: [Int] { fatalError() }
  public var dataType: DataType { fatalError() }
  public func bytes(_ handler: (UnsafeRawPointer, Int, DataType) -> Void) { fatalError() }
  public func asValue() -> Value { fatalError() }
}

public class Value: NSObject, ValueConvertible {
  public var anyTensor: AnyTensor? { fatalError() }
  public func asValue() -> Value { self }
}

public protocol ValueConvertible {
  func asValue() -> Value
}

public class Module: NSObject {
  public init(filePath: String) {}
  public func load() throws { fatalError() }
  public func load(_ method: String) throws { fatalError() }
  public func isLoaded(_ method: String) -> Bool { fatalError() }
  public func execute(_ method: String, _ inputs: [ValueConvertible]) throws -> [Value] { fatalError() }
}
