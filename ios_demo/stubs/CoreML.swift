// The part of Core ML that LordbaKit calls, as Apple's documentation declares it: for checking types on Linux, no more.
import Foundation

public enum MLComputeUnits: Int, Sendable { case cpuOnly, cpuAndGPU, all, cpuAndNeuralEngine }

public enum MLMultiArrayDataType: Int, Sendable { case double, float32, float16, int32 }

public class MLModelConfiguration: NSObject {
  public override init() {}
  public var computeUnits: MLComputeUnits = .all
  @available(macOS 15.0, iOS 18.0, *)
  public var functionName: String?
}

public class MLMultiArray: NSObject {
  public init(shape: [NSNumber], dataType: MLMultiArrayDataType) throws { fatalError() }
  public var dataType: MLMultiArrayDataType { fatalError() }
  public var shape: [NSNumber] { fatalError() }
  public var strides: [NSNumber] { fatalError() }
  public var count: Int { fatalError() }
  public func withUnsafeBytes<R>(_ body: (UnsafeRawBufferPointer) throws -> R) rethrows -> R { fatalError() }
  public func withUnsafeMutableBytes<R>(_ body: (UnsafeMutableRawBufferPointer, [Int]) throws -> R) rethrows -> R {
    fatalError()
  }
}

public class MLFeatureValue: NSObject {
  public convenience init(multiArray value: MLMultiArray) { fatalError() }
  public var multiArrayValue: MLMultiArray? { fatalError() }
}

public protocol MLFeatureProvider {
  var featureNames: Set<String> { get }
  func featureValue(for featureName: String) -> MLFeatureValue?
}

public class MLDictionaryFeatureProvider: NSObject, MLFeatureProvider {
  public init(dictionary: [String: Any]) throws { fatalError() }
  public var featureNames: Set<String> { fatalError() }
  public func featureValue(for featureName: String) -> MLFeatureValue? { fatalError() }
}

public class MLMultiArrayConstraint: NSObject {
  public var shape: [NSNumber] { fatalError() }
}

public class MLFeatureDescription: NSObject {
  public var multiArrayConstraint: MLMultiArrayConstraint? { fatalError() }
}

public class MLModelDescription: NSObject {
  public var inputDescriptionsByName: [String: MLFeatureDescription] { fatalError() }
  @available(macOS 15.0, iOS 18.0, *)
  public var stateDescriptionsByName: [String: MLFeatureDescription] { fatalError() }
}

@available(macOS 15.0, iOS 18.0, *)
public class MLState: NSObject {}

public class MLModel: NSObject {
  public convenience init(contentsOf url: URL, configuration: MLModelConfiguration) throws { fatalError() }
  public class func compileModel(at modelURL: URL) throws -> URL { fatalError() }
  public var modelDescription: MLModelDescription { fatalError() }
  @available(macOS 15.0, iOS 18.0, *)
  public func makeState() -> MLState { fatalError() }
  public func prediction(from input: any MLFeatureProvider) throws -> any MLFeatureProvider { fatalError() }
  @available(macOS 15.0, iOS 18.0, *)
  public func prediction(from input: any MLFeatureProvider, using state: MLState) throws -> any MLFeatureProvider {
    fatalError()
  }
}
